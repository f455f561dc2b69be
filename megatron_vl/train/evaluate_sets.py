"""Held-out losses by set, by source and by modality.

A run has one held-out set a stage: the first packs of that stage's own blend, laid out as that
stage lays them out. After its last step every stage looks at all of them, so that a table of stages
and sets shows what each gained and what it cost (after stage 1, code; stage 3 brings it back).
The sets are the same packs in every stage, at any layout: their number and their padding follow
from the run, not from the stage that looks.

A loss is the square-averaged loss of `loss.py` over the documents of one kind. Text, image and
video are what a document shows, whatever source it comes from.

Cost: one forward pass over `evaluation.packs` packs a set, and a second or less to open each.

Shapes: L tokens of a pack, K kinds of documents, D documents.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import torch.distributed
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import MODALITIES, Pack
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.build import Trainee
from megatron_vl.train.step import run_model

KindsOf = Callable[[Pack], Sequence[int]]
"""The kind of each document of a pack, from 0."""


@dataclass(frozen=True)
class HeldOutLoss:
    """The loss of a set, and of its documents by source and by modality. [nats]"""

    loss: float
    sources: dict[str, float] = field(default_factory=dict)
    modalities: dict[str, float] = field(default_factory=dict)

    def metrics(self, name: str) -> dict[str, float]:
        """As a receipt holds them: `eval/NAME`, `eval/NAME/source/S`, `eval/NAME/modality/M`."""
        return {
            f"eval/{name}": self.loss,
            **{f"eval/{name}/source/{key}": loss for key, loss in self.sources.items()},
            **{f"eval/{name}/modality/{key}": loss for key, loss in self.modalities.items()},
        }


def held_out_sets(run: RunFolder, config: StageConfig) -> dict[str, StageConfig]:
    """The sets of a run's training stages by stage name, as the stage `config` looks at them.

    A stage with the data of an earlier one has no set of its own. Sets of longer packs than
    `evaluation.longest_pack` are left out.
    """
    kinds = {entry["name"]: entry.get("kind", "train") for entry in run.plan()["stages"]}
    stages = [
        load_stage(stage.config_path)
        for stage in run.stages()
        if kinds[stage.name] == "train" and stage.config_path.exists()
    ]
    longest = config.evaluation.longest_pack or math.inf
    alignment = math.lcm(*(stage.data.document_alignment for stage in stages))
    sets: dict[str, StageConfig] = {}
    for stage in stages:
        looked_at = replace(
            config,
            data=replace(stage.data, document_alignment=alignment),
            train=replace(
                config.train, global_batch=config.evaluation.packs, seed=stage.train.seed
            ),
        )
        if stage.data.sequence_length <= longest and looked_at not in sets.values():
            sets[stage.name] = looked_at
    return sets


def evaluate_set(config: StageConfig, trainee: Trainee, batches: int) -> HeldOutLoss:
    """The loss over the first global batches of a blend's held-out split, the same every time.

    Args:
        config: whose data section, global batch and seed make up the set.
    """
    groups, sources = trainee.groups, sorted(config.data.blend)
    loader = PackLoader(config, split="val", rank=groups.dp.rank(), size=groups.dp.size(), cursor=0)
    total_2K = torch.zeros(2, len(sources) * len(MODALITIES), dtype=torch.float64)

    def kinds_of(pack: Pack) -> list[int]:
        return [
            sources.index(source) * len(MODALITIES) + MODALITIES.index(modality)
            for source, modality in zip(pack.sample_sources, pack.modalities, strict=True)
        ]

    try:
        for _ in range(batches):
            total_2K += losses_by_kind(
                loader.next_batch(), kinds_of, total_2K.shape[1], trainee, config
            )
    finally:
        loader.close()
    total_2SM = total_2K.unflatten(1, (len(sources), len(MODALITIES)))
    loss, weight = total_2K.sum(1).tolist()
    return HeldOutLoss(
        loss / weight,
        _means(sources, total_2SM.sum(2)),
        _means(MODALITIES, total_2SM.sum(1)),
    )


def _means(names: Sequence[str], sums_2K: Tensor) -> dict[str, float]:
    """Mean loss of each kind that any document is of."""
    losses, weights = sums_2K.tolist()
    return {
        name: loss / weight
        for name, loss, weight in zip(names, losses, weights, strict=True)
        if weight > 0
    }


@torch.no_grad()
def losses_by_kind(
    packs: list[Pack], kinds_of: KindsOf, num_kinds: int, trainee: Trainee, config: StageConfig
) -> Tensor:
    """Losses of one global batch, told apart by kinds of documents.

    Args:
        packs: this rank's packs.

    Returns:
        (2, num_kinds) float64 on the host, equal on every rank: the sums of weighted token losses,
        and the weights they are to be divided by.
    """
    trainee.wrapped.eval()
    found = get_forward_backward_func()(
        forward_step_func=partial(
            _forward, trainee=trainee, kinds_of=kinds_of, num_kinds=num_kinds
        ),
        data_iterator=iter(packs),
        model=[trainee.wrapped],
        num_microbatches=len(packs),
        seq_length=config.data.sequence_length,
        micro_batch_size=1,
        forward_only=True,
    )
    total_2K = torch.zeros(2, num_kinds, dtype=torch.float64, device=PLATFORM.device)
    if found:
        total_2K += torch.stack(found).sum(0)
    torch.distributed.all_reduce(total_2K, group=trainee.groups.dp_cp)
    torch.distributed.all_reduce(total_2K, group=trainee.groups.pp)
    return total_2K.cpu()


def _forward(
    packs: Iterator[Pack], model: nn.Module, *, trainee: Trainee, kinds_of: KindsOf, num_kinds: int
) -> tuple[Tensor, partial[tuple[Tensor, Tensor]]]:
    """megatron-core's forward-step protocol, as `step` has it, with sums told apart by kind."""
    pack = next(packs)
    output, documents, weights_L = run_model(pack, model, trainee)
    kinds_D = torch.tensor([*kinds_of(pack), 0])  # the last is padding's, which weighs nothing
    kinds_L = documents.local(kinds_D[pack.document_ids_L.long()].to(PLATFORM.device))
    return output, partial(_sums, weights_L=weights_L, kinds_L=kinds_L, num_kinds=num_kinds)


def _sums(
    losses_BL: Tensor, *, weights_L: Tensor, kinds_L: Tensor, num_kinds: int
) -> tuple[Tensor, Tensor]:
    weighted_2L = torch.stack([losses_BL.float().squeeze(0) * weights_L, weights_L]).double()
    sums_2K = weighted_2L.new_zeros(2, num_kinds).index_add_(1, kinds_L, weighted_2L)
    return sums_2K[0].sum(), sums_2K
