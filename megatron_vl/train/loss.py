"""The square-averaged loss, exact at any layout.

With n_i supervised tokens in assistant turn i and mean loss L_i, the published weighting is
sum(sqrt(n_i) L_i) / sum(sqrt(n_i)). Written over tokens, each weighs 1/sqrt(n_i) and the
denominator is the sum of sqrt(n_i); both are known on the host before the forward pass. The
denominator here is that of the whole global batch, so the result does not depend on how packs fall
into micro-batches or ranks (Megatron-LM's example averages pack by pack).

The division happens inside the loss function, because megatron-core's own token counting holds
integers. `undo_averaging` cancels, in one place, the averages that the pipeline schedule (over
micro-batches) and the data-parallel gradient reduction (over ranks) apply on top.
"""

import torch
import torch.distributed
from torch import Tensor


def weighted_sum(losses_BL: Tensor, weights_L: Tensor) -> Tensor:
    """Sum of token losses times their weights, in float32.

    Args:
        losses_BL: (1, L) token losses; of a context rank's shard where there are several.
        weights_L: (L,) 1/sqrt(n) of each supervised token's turn, 0 elsewhere.
    """
    return (losses_BL.float().squeeze(0) * weights_L).sum()


def undo_averaging(num_micro_batches: int, data_parallel_size: int) -> float:
    """Factor that makes the accumulated gradient the gradient of the global batch's loss.

    megatron-core's schedule divides a micro-batch's loss by the number of micro-batches and
    multiplies it by that of context ranks, and its gradient buffers are averaged over data and
    context ranks; the loss is divided by the global weight already, and each context rank's is its
    own part of a sum.
    """
    return float(num_micro_batches * data_parallel_size)


def sum_over_ranks(values: list[float], group: torch.distributed.ProcessGroup) -> list[float]:
    """Add host-side counts over a group, in float64."""
    totals = torch.tensor(values, dtype=torch.float64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(totals, group=group)
    return [float(total) for total in totals.tolist()]
