"""One pass of the real model for measuring: largest inputs of its linears, and inputs exchanged.

What: a model on one process whose linears let their inputs be seen or replaced, and the packs of a
stage's plan to run it on. Quantized releases are calibrated with it, and their activations
quantized.
Why the torch layer spec, also where Transformer Engine is: there norm and linear are one kernel,
and what goes into the product is not to be had.
Which packs: the first pack of each global batch from the plan's start, the same for every caller.
What it costs: the model once in memory and one forward pass a pack; no gradients.

Shapes: L pack length, B batch (1), H input width of a linear.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from megatron_vl.config.schema import ParallelConfig, Precision, StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.data.plan import DataEndedError
from megatron_vl.engine import process_groups
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import build_model

Exchange = Callable[[str, Tensor], Tensor]
"""From a linear's name and input to the input it multiplies."""


@dataclass(frozen=True)
class CalibrationProgress:
    """How far a pass is."""

    packs: int
    of: int
    tokens: int

    def __str__(self) -> str:
        return f"calibration: {self.packs} of {self.of} packs, {self.tokens:,} tokens"


@contextlib.contextmanager
def plain_model(
    config: StageConfig, precision: Precision | None = None
) -> Iterator[VisionLanguageModel]:
    """A stage's model on this one process and the torch layer spec; its weights are not there yet.

    Args:
        precision: what it computes in; by default the stage's, without FP8.
    """
    alone = replace(config, parallel=ParallelConfig(), precision=precision or config.precision)
    with TemporaryDirectory(prefix="mvl-") as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        try:
            groups = process_groups.create(alone.parallel, alone.train.seed)
            module = build_model(alone, groups, TORCH_BLOCKS)
            module.eval()
            yield module
        finally:
            process_groups.leave_world()


def planned_packs(config: StageConfig, split: str, count: int) -> Iterator[Pack]:
    """The first pack of each of the first global batches of a stage's plan, at most `count`.

    Args:
        split: train or val.

    Raises:
        FileNotFoundError, ValueError: as `PackLoader`.
    """
    size = config.train.global_batch
    loader = PackLoader(config, split=split, rank=0, size=size)
    try:
        for _ in range(count):
            try:
                batch = loader.next_batch()
            except DataEndedError:
                return
            yield batch[0]
    finally:
        loader.close()


def shown_tokens(pack: Pack) -> int:
    """Tokens of a pack before the padding at its end."""
    return int(pack.cu_seqlens[-2 if pack.document_lengths[-1] == 0 else -1])


@torch.no_grad()
def pack_logits(module: VisionLanguageModel, pack: Pack, places: Tensor | None = None) -> Tensor:
    """Logits of one pack, (L, padded vocabulary), in the model's type.

    Args:
        places: int64 places of the pack whose logits are wanted; only they are computed.
    """
    device = PLATFORM.device
    documents = packed_sequence(
        pack.document_ids_L,
        pack.cu_seqlens,
        pack.max_document_length,
        device,
        padding=pack.document_lengths[-1] == 0,
    )
    visual = visual_input(pack, device)
    with _only(module, places):
        logits_BLV = module(pack.tokens_L.to(device).unsqueeze(0), visual, documents)
    return logits_BLV[0]


@contextlib.contextmanager
def _only(module: VisionLanguageModel, places: Tensor | None) -> Iterator[None]:
    """Give the output layer the hidden states of some places alone."""
    if places is None:
        yield
        return
    chosen = places.to(PLATFORM.device)

    def choose(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0].index_select(0, chosen), *inputs[1:])

    hook = module.language_model.output_layer.register_forward_pre_hook(choose)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def exchanged_inputs(module: nn.Module, names: Iterable[str], exchange: Exchange) -> Iterator[None]:
    """Pass what the named linears multiply through `exchange` while the block runs.

    Args:
        names: modules of the torch spec's linears; the input is the product's own, behind the norm.
    """
    changed: list[Any] = []
    try:
        for name in names:
            linear: Any = module.get_submodule(name)
            linear._forward_impl = partial(_multiply, exchange, name, linear._forward_impl)
            changed.append(linear)
        yield
    finally:
        for linear in changed:
            del linear._forward_impl


def _multiply(
    exchange: Exchange, name: str, product: Callable[..., Tensor], input: Tensor, **kwargs: Any
) -> Tensor:
    """megatron-core's hook for the product, with another input."""
    return product(input=exchange(name, input), **kwargs)


def largest_inputs(
    module: VisionLanguageModel,
    names: Iterable[str],
    packs: Iterable[Pack],
    count: int,
    report: Callable[[CalibrationProgress], None],
) -> tuple[Mapping[str, Tensor], CalibrationProgress]:
    """The largest magnitude of each named linear's input over some packs.

    Args:
        count: packs that will come, for the report.

    Returns:
        float32 numbers by name, and how much was seen; padding at the end of a pack is not looked
        at, as nobody serves it.

    Raises:
        ValueError: no pack came, or an input is infinite or NaN.
    """
    largest: dict[str, Tensor] = {}
    ordered = list(names)

    def watch(name: str, input_LBH: Tensor) -> Tensor:
        found = input_LBH[:shown].abs().max().float()
        largest[name] = torch.maximum(largest.get(name, found), found)
        return input_LBH

    done = CalibrationProgress(0, count, 0)
    with exchanged_inputs(module, ordered, watch):
        for pack in packs:
            shown = shown_tokens(pack)
            pack_logits(module, pack, torch.tensor([shown - 1]))
            done = CalibrationProgress(done.packs + 1, count, done.tokens + pack.num_tokens)
            report(done)
    if not done.packs:
        raise ValueError("calibration saw no pack: the stage's data gives none")
    broken = [name for name in ordered if not bool(largest[name].isfinite())]
    if broken:
        raise ValueError(f"the input of {broken[0]} is infinite or NaN; the checkpoint is broken")
    return {name: largest[name].cpu() for name in ordered}, done
