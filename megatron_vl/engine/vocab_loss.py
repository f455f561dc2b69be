"""The output layer and its cross-entropy in one step, a chunk of tokens at a time.

What: from hidden states and this tensor rank's rows of the output matrix to the loss of each token.
Logits exist in float32 for one chunk; the backward pass computes them again. The gradient of the
weight adds up in float32 over the chunks; that of the hidden states is summed over tensor ranks
(and split along the sequence under sequence parallelism), chunk by chunk.

Why: full float32 logits of 311,296 tokens and 132,096 rows are 153 GiB before sharding, and
megatron-core keeps them, and the softmax, from forward to backward.

What it refuses: nothing; `config.check` guards the chunk length. What it costs: the output matrix
is applied a third time in training; two small reductions a chunk over tensor ranks in the forward
pass, one in the backward pass; 8 bytes a token kept between them, besides the input.

Source: the same sums as megatron-core's `vocab_parallel_cross_entropy` over full logits.

Shapes: L sequence, B batch, H hidden, V rows of the output matrix on this rank, R tensor ranks
whose sequence parts are gathered (1 without sequence parallelism), N tokens of one part, C tokens
of a chunk over all parts.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Split:
    """How tensor ranks share the work.

    Attributes:
        group: the tensor ranks, each with its own rows of the output matrix.
        sequence: each rank also holds its own part of the sequence.
        chunk: tokens whose logits exist at a time, over all parts.
    """

    group: dist.ProcessGroup
    sequence: bool
    chunk: int

    @property
    def parts(self) -> int:
        """Parts of the sequence that a chunk is gathered from."""
        return self.group.size() if self.sequence else 1

    def spans(self, tokens: int) -> Iterator[slice]:
        """Each part's tokens of one chunk after the other."""
        width = max(1, self.chunk // self.parts)
        for start in range(0, tokens, width):
            yield slice(start, min(start + width, tokens))

    def gather(self, part_NH: Tensor) -> Tensor:
        """A chunk's rows (C, H) from each rank's part of it, part by part."""
        if self.parts == 1:
            return part_NH
        rows_CH = part_NH.new_empty(self.parts * part_NH.shape[0], part_NH.shape[1])
        dist.all_gather_into_tensor(rows_CH, part_NH.contiguous(), group=self.group)
        return rows_CH

    def reduce(self, partial_CH: Tensor) -> Tensor:
        """The opposite: sum over tensor ranks, and this rank's part of the rows."""
        if self.group.size() == 1:
            return partial_CH
        if not self.sequence:
            dist.all_reduce(partial_CH, group=self.group)
            return partial_CH
        part_NH = partial_CH.new_empty(partial_CH.shape[0] // self.parts, partial_CH.shape[1])
        dist.reduce_scatter_tensor(part_NH, partial_CH, group=self.group)
        return part_NH


def chunked_cross_entropy(
    hidden_LBH: Tensor, weight_VH: Tensor, labels_BL: Tensor, split: Split
) -> Tensor:
    """Cross-entropy of each token.

    Args:
        hidden_LBH: output of the final norm; this rank's part of L under sequence parallelism.
        weight_VH: this rank's rows of the output matrix.
        labels_BL: int64 rows of the whole matrix, the whole sequence.

    Returns:
        (B, L) float32 losses of the whole sequence, the same on all tensor ranks.
    """
    length, batch = labels_BL.shape[1], labels_BL.shape[0]
    labels_RN = labels_BL.t().reshape(split.parts, -1)
    losses_RN = _ChunkedCrossEntropy.apply(hidden_LBH.flatten(0, 1), weight_VH, labels_RN, split)
    return losses_RN.view(length, batch).t()


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Losses (R, N) from hidden states (N, H), rows (V, H) and labels (R, N)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_NH: Tensor, weight_VH: Tensor, labels_RN: Tensor, split: Split
    ) -> Tensor:
        losses_RN = hidden_NH.new_empty(labels_RN.shape, dtype=torch.float32)
        # The largest logit of each token and the sum of exp(logit - largest).
        largest_RN, total_RN = torch.empty_like(losses_RN), torch.empty_like(losses_RN)
        for span in split.spans(hidden_NH.shape[0]):
            logits_CV = product(split.gather(hidden_NH[span]), weight_VH.t())
            row_C, mine_C = _own_rows(labels_RN[:, span], weight_VH, split)
            largest_C = logits_CV.amax(dim=1)
            if split.group.size() > 1:
                dist.all_reduce(largest_C, op=dist.ReduceOp.MAX, group=split.group)
            logits_CV.sub_(largest_C.unsqueeze(1))
            target_C = logits_CV.gather(1, row_C.unsqueeze(1)).squeeze(1) * mine_C
            sums_2C = torch.stack([logits_CV.exp_().sum(dim=1), target_C])
            del logits_CV  # before the next chunk's are made
            if split.group.size() > 1:
                dist.all_reduce(sums_2C, group=split.group)
            shape = (split.parts, -1)
            losses_RN[:, span] = (sums_2C[0].log() - sums_2C[1]).view(shape)
            largest_RN[:, span] = largest_C.view(shape)
            total_RN[:, span] = sums_2C[0].view(shape)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden_NH, weight_VH, labels_RN, largest_RN, total_RN)
            ctx.split = split
        return losses_RN

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, labels_RN, largest_RN, total_RN = ctx.saved_tensors
        split: Split = ctx.split
        (grad_losses_RN,) = grads
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        for span in split.spans(hidden_NH.shape[0]):
            rows_CH = split.gather(hidden_NH[span])
            grad_CV = product(rows_CH, weight_VH.t())
            largest_C, total_C, grad_C = (
                tensor_RN[:, span].flatten() for tensor_RN in (largest_RN, total_RN, grad_losses_RN)
            )
            grad_CV.sub_(largest_C.unsqueeze(1)).exp_().div_(total_C.unsqueeze(1))
            row_C, mine_C = _own_rows(labels_RN[:, span], weight_VH, split)
            grad_CV.scatter_add_(1, row_C.unsqueeze(1), -mine_C.unsqueeze(1))
            narrow_CV = grad_CV.mul_(grad_C.unsqueeze(1)).to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[span] = split.reduce(narrow_CV @ weight_VH)
            if grad_weight_VH is not None:
                add_product(grad_weight_VH, narrow_CV.t(), rows_CH)
            del grad_CV, narrow_CV  # before the next chunk's are made
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None


def _own_rows(labels_RN: Tensor, weight_VH: Tensor, split: Split) -> tuple[Tensor, Tensor]:
    """For each token of a chunk the label's row on this rank (0 if elsewhere), and 1.0 if here."""
    rows = weight_VH.shape[0]
    local_C = labels_RN.flatten() - rows * split.group.rank()
    here_C = (local_C >= 0) & (local_C < rows)
    return local_C * here_C, here_C.float()


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, summed and kept in float32."""
    if left.dtype is torch.float32:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, with a float32 total."""
    if left.dtype is torch.float32:
        total.addmm_(left, right)
    elif left.is_cuda:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(left.float(), right.float())
