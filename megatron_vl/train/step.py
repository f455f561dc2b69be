"""One optimizer step over one global batch, and the held-out loss of one: the same forward pass.

Every rank of a data-parallel replica reads the same packs; the first pipeline stage uses tokens and
tiles, the last labels and weights.
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
from megatron_vl.data.pack import Pack
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.train.build import Trainee
from megatron_vl.train.loss import sum_over_ranks, undo_averaging, weighted_sum


@dataclass(frozen=True)
class BatchCounts:
    """What one global batch holds, summed over data-parallel ranks.

    Attributes:
        weight: sum over assistant turns of sqrt(supervised tokens).
        tokens: tokens, padding not counted.
        samples: documents.
        tiles: image tiles.
        flops: model FLOPs of a training step on it (0 where not asked for).
    """

    weight: float
    tokens: int
    samples: int
    tiles: int
    flops: float


@dataclass(frozen=True)
class StepResult:
    """Loss of the global batch and, after a training step, the gradient's norm before clipping."""

    loss: float
    grad_norm: float


class NonFiniteLossError(RuntimeError):
    """The loss of a step is NaN or infinite; the weights have not been updated with it."""


def count(packs: list[Pack], trainee: Trainee, flops: float = 0.0) -> BatchCounts:
    """Add up the packs of one global batch over the data-parallel ranks."""
    totals = sum_over_ranks(
        [
            sum(pack.weight_total for pack in packs),
            sum(pack.num_tokens for pack in packs),
            sum(len(pack.sample_keys) for pack in packs),
            sum(pack.tiles_TCHW.shape[0] for pack in packs),
            flops,
        ],
        trainee.groups.dp,
    )
    weight, tokens, samples, tiles, all_flops = totals
    return BatchCounts(weight, round(tokens), round(samples), round(tiles), all_flops)


def _forward(
    packs: Iterator[Pack], model: nn.Module, *, scale: float
) -> tuple[Tensor, partial[tuple[Tensor, Tensor]]]:
    """megatron-core's forward-step protocol: the stage's output, and how to turn it into a loss."""
    pack = next(packs)
    device = PLATFORM.device
    output = model(
        pack.tokens_L.to(device, non_blocking=True).unsqueeze(0),
        pack.tiles_TCHW.to(device, non_blocking=True),
        pack.visual_positions_V.to(device, non_blocking=True),
        packed_sequence(pack.document_ids_L, pack.cu_seqlens, pack.max_document_length, device),
        labels_BL=pack.labels_L.to(device, non_blocking=True).unsqueeze(0),
    )
    weights_L = pack.loss_weights_L.to(device, non_blocking=True)
    return output, partial(_loss, weights_L=weights_L, scale=scale)


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
) -> float:
    """Forward (and backward) over one global batch.

    Returns:
        The batch's square-averaged loss, the same on every rank.
    """
    assert counts.weight > 0, "a global batch without a supervised token"
    scale = undo_averaging(len(packs), trainee.groups.dp.size()) / counts.weight
    results = get_forward_backward_func()(
        forward_step_func=partial(_forward, scale=scale),
        data_iterator=iter(packs),
        model=[trainee.wrapped],
        num_microbatches=len(packs),
        seq_length=config.data.sequence_length,
        micro_batch_size=1,
        forward_only=forward_only,
    )
    return _global_loss(results, trainee) / counts.weight


def _global_loss(micro_losses: list[Tensor], trainee: Trainee) -> float:
    """Sum of the micro-batches' losses over data-parallel ranks, told to all pipeline stages."""
    total = torch.zeros((), dtype=torch.float64, device=PLATFORM.device)
    if micro_losses:
        total += torch.stack(micro_losses).double().sum()
    torch.distributed.all_reduce(total, group=trainee.groups.dp)
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
    loss = run_batch(packs, counts, trainee, config, forward_only=False)
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
    return StepResult(loss=loss, grad_norm=float(grad_norm))


@torch.no_grad()
def evaluate_batch(
    packs: list[Pack], counts: BatchCounts, trainee: Trainee, config: StageConfig
) -> float:
    """Held-out loss of one global batch."""
    trainee.wrapped.eval()
    return run_batch(packs, counts, trainee, config, forward_only=True)
