"""What ranks do in the isolation tests: logits of a pack before and after one change in it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine.packed import PackedSequence, packed_sequence
from megatron_vl.model.visual import visual_input
from megatron_vl.train.build import Trainee
from megatron_vl.train.synthetic import synthetic_packs
from tests.support.packs import CPU
from tests.train.exact_jobs import noisy_trainee, stage


@dataclass(frozen=True)
class Change:
    """Changed tokens or pixels of one document, and the documents they changed on this rank."""

    document: int
    what: str
    changed: frozenset[int]


def changes(file: Path, overrides: Sequence[str]) -> list[Change]:
    """The first and last token of every document of a pack, then a pixel of two of its pictures,
    document by document; of each change the documents some of whose logits here changed."""
    config = stage(file, overrides)
    trainee = noisy_trainee(config)
    trainee.wrapped.eval()
    (pack,) = synthetic_packs(config, 0)
    before = logits(pack, trainee, config)
    found = []
    for document, what, other in changed_packs(pack, config):
        after = logits(other, trainee, config)
        found.append(Change(document, what, different(before, after, pack, trainee)))
    return found


def changed_packs(pack: Pack, config: StageConfig) -> Iterator[tuple[int, str, Pack]]:
    """Every changed pack, with the document that was touched."""
    owners = unit_owners(pack)
    starts = pack.cu_seqlens.tolist()
    for document, length in enumerate(pack.document_lengths):
        if not length:
            continue
        tokens_L = pack.tokens_L.clone()
        tokens_L[[starts[document], starts[document] + length - 1]] += 1
        tokens_L %= config.model.vocab_size
        yield document, "tokens", replace(pack, tokens_L=tokens_L)
        units = [unit for unit, owner in enumerate(owners) if owner == document]
        if units:
            patches_PF = pack.patches_PF.clone()
            # Of a video's four frames the first and the third: the others keep nothing.
            for unit in {units[0], units[len(units) // 2]}:
                patches_PF[sum(grid.patches for grid in pack.grids[:unit]), 5] += 128
            yield document, "pixels", replace(pack, patches_PF=patches_PF)


def unit_owners(pack: Pack) -> list[int]:
    """The document of each visual unit of a synthetic pack."""
    owner_of_row = dict(zip(pack.visual_rows_L.tolist(), pack.document_ids_L.tolist(), strict=True))
    owners, row, owner = [], 0, -1
    for grid in pack.grids:
        # A pruned frame may have no reserved place: it belongs to the unit before it.
        rows = [owner_of_row[r] for r in range(row, row + grid.tokens) if r in owner_of_row]
        owner = rows[0] if rows else owner
        owners.append(owner)
        row += grid.tokens
    return owners


def logits(pack: Pack, trainee: Trainee, config: StageConfig) -> Tensor | None:
    """This rank's logits (S, V), through the pipeline's schedule; None before the last stage."""

    def forward(packs: Iterator[Pack], model: nn.Module) -> tuple[Tensor, object]:
        one = next(packs)
        output = model(
            one.tokens_L.unsqueeze(0),
            visual_input(one, CPU, **context(trainee)),
            documents(one, trainee),
        )
        return output, lambda logits_BSV: (logits_BSV.float().sum(), logits_BSV.squeeze(0).clone())

    with torch.no_grad():
        results = get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iter([pack]),
            model=[trainee.wrapped],
            num_microbatches=1,
            seq_length=config.data.sequence_length,
            micro_batch_size=1,
            forward_only=True,
        )
    return results[0] if results else None


def context(trainee: Trainee) -> dict[str, int]:
    group = trainee.groups.cp
    return {"context_size": group.size(), "context_rank": group.rank()}


def documents(pack: Pack, trainee: Trainee) -> PackedSequence:
    return packed_sequence(
        pack.document_ids_L,
        pack.cu_seqlens,
        pack.max_document_length,
        CPU,
        padding=pack.document_lengths[-1] == 0,
        **context(trainee),
    )


def different(
    before: Tensor | None, after: Tensor | None, pack: Pack, trainee: Trainee
) -> frozenset[int]:
    """Documents with a logit that differs in any bit."""
    if before is None or after is None:
        return frozenset()
    ids_S = documents(pack, trainee).local(pack.document_ids_L)
    return frozenset(ids_S[(before != after).any(dim=1)].tolist())
