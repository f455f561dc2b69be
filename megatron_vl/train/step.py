"""One optimizer step over one global batch, and the held-out loss of one: the same forward pass.

Every rank of a data-parallel replica reads the same packs; the first pipeline stage uses tokens and
pictures, the last labels and weights, and of those each context rank its own shard.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.flops import PackFlops
from megatron_vl.data.pack import Pack
from megatron_vl.engine.packed import PackedSequence, packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.decoder import Head
from megatron_vl.model.visual import visual_input
from megatron_vl.train.build import Trainee
from megatron_vl.train.loss import sum_over_ranks, undo_averaging, weighted_sum


@dataclass(frozen=True)
class BatchCounts:
    """What one global batch holds, summed over data-parallel ranks.

    Attributes:
        weight: sum over assistant turns of sqrt(supervised tokens).
        tokens: tokens, padding not counted.
        samples: documents.
        tiles: tiles, frames and images the encoder sees.
        flops: model FLOPs of a training step on it (0 where not asked for).
        hardware_flops: everything that runs for it, recompute included.
    """

    weight: float
    tokens: int
    samples: int
    tiles: int
    flops: float
    hardware_flops: float


@dataclass(frozen=True)
class StepResult:
    """Loss of the global batch and, after a training step, the gradient's norm before clipping."""

    loss: float
    grad_norm: float


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite; the weights have not been updated with it."""


def count(packs: list[Pack], trainee: Trainee, flops: PackFlops | None = None) -> BatchCounts:
    """Add up the packs of one global batch, and their FLOPs, over the data-parallel ranks."""
    flops = flops or PackFlops()
    totals = sum_over_ranks(
        [
            sum(pack.weight_total for pack in packs),
            sum(pack.num_tokens for pack in packs),
            sum(len(pack.sample_keys) for pack in packs),
            sum(len(pack.grids) for pack in packs),
            flops.total,
            flops.hardware,
        ],
        trainee.groups.dp,
    )
    weight, tokens, samples, tiles, *all_flops = totals
    return BatchCounts(weight, round(tokens), round(samples), round(tiles), *all_flops)


def _forward(
    batch: Iterator[tuple[Pack, Head | None]],
    model: nn.Module,
    *,
    trainee: Trainee,
    scale: float,
) -> tuple[Tensor, partial[tuple[Tensor, Tensor]]]:
    """megatron-core's forward-step protocol: the stage's output, and how to turn it into a loss."""
    pack, head = next(batch)
    output, _, weights_L = run_model(pack, model, trainee, head)
    return output, partial(_loss, weights_L=weights_L, scale=scale)


def run_model(
    pack: Pack, model: nn.Module, trainee: Trainee, head: Head | None = None
) -> tuple[Tensor, PackedSequence, Tensor]:
    """The stage's output for a pack, the pack's documents, and this rank's loss weights.

    Args:
        head: what the last stage gives in place of the token losses.
    """
    device = PLATFORM.device
    context = {
        "context_size": trainee.groups.cp.size(),
        "context_rank": trainee.groups.cp.rank(),
    }
    documents = packed_sequence(
        pack.document_ids_L,
        pack.cu_seqlens,
        pack.max_document_length,
        device,
        padding=pack.document_lengths[-1] == 0,
        **context,
    )
    labels_L = documents.local(pack.labels_L.to(device, non_blocking=True))
    weights_L = documents.local(pack.loss_weights_L.to(device, non_blocking=True))
    output = model(
        pack.tokens_L.to(device, non_blocking=True).unsqueeze(0),
        visual_input(pack, device, **context) if trainee.module.pre_process else None,
        documents,
        labels_BL=labels_L.unsqueeze(0),
        head=head,
    )
    return output, documents, weights_L


def _loss(losses_BL: Tensor, *, weights_L: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    total = weighted_sum(losses_BL, weights_L)
    return total * scale, total.detach()


def run_batch(
    packs: list[Pack],
    counts: BatchCounts,
    trainee: Trainee,
    config: StageConfig,
    *,
    forward_only: bool,
    taught: bool = False,
) -> float:
    """Forward (and backward) over one global batch.

    Args:
        taught: the loss is the divergence from the teacher, not from the labels.

    Returns:
        The batch's square-averaged loss, the same on every rank.
    """
    heads: list[Head | None] = [None] * len(packs)
    if taught:
        assert trainee.distillation is not None
        heads = trainee.distillation.heads(packs, trainee, config)
    assert counts.weight > 0, "a global batch without a supervised token"
    scale = undo_averaging(len(packs), trainee.groups.dp.size()) / counts.weight
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward, trainee=trainee, scale=scale),
        data_iterator=iter(list(zip(packs, heads, strict=True))),
        model=[trainee.wrapped],
        num_microbatches=len(packs),
        seq_length=config.data.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _global_loss(results, trainee) / counts.weight


def _global_loss(micro_losses: list[Tensor], trainee: Trainee) -> float:
    """Sum of the micro-batches' losses over data and context ranks, told to all pipeline stages."""
    total = torch.zeros((), dtype=torch.float64, device=PLATFORM.device)
    if micro_losses:
        total += torch.stack(micro_losses).double().sum()
    torch.distributed.all_reduce(total, group=trainee.groups.dp_cp)
    torch.distributed.all_reduce(total, group=trainee.groups.pp)
    return float(total)


def train_step(
    packs: list[Pack],
    counts: BatchCounts,
    trainee: Trainee,
    config: StageConfig,
    learning_rate: float,
) -> StepResult:
    """One optimizer step.

    Args:
        packs: this rank's packs of the global batch.
        counts: what the whole global batch holds.

    Raises:
        NonFiniteLossError: before the update, so that the last good weights stay.
    """
    trainee.wrapped.train()
    trainee.wrapped.zero_grad_buffer()
    trainee.optimizer.zero_grad()
    taught = trainee.distillation is not None
    loss = run_batch(packs, counts, trainee, config, forward_only=False, taught=taught)
    if not math.isfinite(loss):
        keys = ", ".join(key for pack in packs for key in pack.sample_keys[:3])
        raise NonFiniteLossError(f"the loss is {loss}; first samples of this rank's packs: {keys}")
    trainee.optimizer.prepare_grads()
    if not math.isfinite(trainee.optimizer.get_grad_norm()):
        raise NonFiniteLossError(f"the loss is {loss}, but a gradient is not finite")
    for group in trainee.optimizer.param_groups:
        group["lr"] = learning_rate
    updated, grad_norm, _ = trainee.optimizer.step()
    if not updated:
        raise NonFiniteLossError("the optimizer skipped the step: a gradient is not finite")
    if trainee.fp8 is not None:
        trainee.fp8.advance()
    if trainee.distillation is not None:
        trainee.distillation.student.refresh()
    return StepResult(loss=loss, grad_norm=float(grad_norm))


@torch.no_grad()
def evaluate_batch(
    packs: list[Pack],
    counts: BatchCounts,
    trainee: Trainee,
    config: StageConfig,
    *,
    taught: bool = False,
) -> float:
    """Held-out loss of one global batch; `taught` as in `run_batch`."""
    trainee.wrapped.eval()
    return run_batch(packs, counts, trainee, config, forward_only=True, taught=taught)
