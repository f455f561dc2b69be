"""The divergence of a student's next-token distribution from a teacher's, a chunk at a time.

What: from the hidden states of both and this tensor rank's rows of both output matrices to
KL(teacher || student) of each token. Logits exist in float32 for one chunk of tokens, as in
`vocab_loss`; the backward pass computes them again.

A distribution close to its teacher keeps its digits: the divergence is a sum of terms that are
never negative and small where it is small (see `_terms`), not a difference of large sums.

What it refuses: nothing. What it costs: two output matrices applied twice in training, and the
student's gradients; three small reductions a chunk over tensor ranks in the forward pass; six times
a chunk's logits at its peak, 8 bytes a token kept between the passes.

Shapes: as in `vocab_loss`: L sequence, B batch, H hidden, V rows on this rank, R parts of the
sequence, N tokens of one part, C tokens of a chunk over all parts.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_vl.engine.vocab_loss import Split, add_product, product


@dataclass(frozen=True)
class Target:
    """What a student is compared with: a teacher's output at every token.

    Attributes:
        hidden_LBH: the teacher's output of the final norm; this rank's part of L under sequence
            parallelism.
        weight_VH: this rank's rows of the teacher's output matrix.
        temperature: logits are divided by it, and the divergence multiplied by its square.
    """

    hidden_LBH: Tensor
    weight_VH: Tensor
    temperature: float = 1.0

    def divergence(self, hidden_LBH: Tensor, weight_VH: Tensor, split: Split) -> Tensor:
        """KL(teacher || student) of each token of a student with these states and rows.

        Returns:
            (B, L) float32, the whole sequence, the same on all tensor ranks.
        """
        batch = hidden_LBH.shape[1]
        found_RN = _ChunkedDivergence.apply(
            hidden_LBH.flatten(0, 1), weight_VH, self.hidden_LBH.flatten(0, 1), self, split
        )
        return found_RN.view(-1, batch).t()

    def log_probabilities(
        self, rows_CH: Tensor, weight_VH: Tensor, normalizer_C: Tensor | None = None
    ) -> Tensor:
        """Logits (C, V) over temperature, less the logarithm of their exponentials' sum."""
        logits_CV = product(rows_CH, weight_VH.t())
        if self.temperature != 1:
            logits_CV.div_(self.temperature)
        return logits_CV if normalizer_C is None else logits_CV.sub_(normalizer_C.unsqueeze(1))


class _ChunkedDivergence(torch.autograd.Function):
    """Divergences (R, N) from the student's hidden states (N, H) and rows (V, H)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        teacher_NH: Tensor,
        target: Target,
        split: Split,
    ) -> Tensor:
        tokens = hidden_NH.shape[0]
        found_RN = hidden_NH.new_empty((split.parts, tokens), dtype=torch.float32)
        normalizers_2RN = found_RN.new_empty((2, split.parts, tokens))
        for span in split.spans(tokens):
            student_CV = target.log_probabilities(split.gather(hidden_NH[span]), weight_VH)
            teacher_CV = target.log_probabilities(split.gather(teacher_NH[span]), target.weight_VH)
            normalizers_2C = _normalize(student_CV, teacher_CV, split.group)
            terms_CV = _terms(student_CV, teacher_CV)
            del student_CV, teacher_CV  # before the next chunk's are made
            sums_C = _reduced(terms_CV.sum(dim=1), split.group)
            found_RN[:, span] = sums_C.view(split.parts, -1)
            normalizers_2RN[:, :, span] = normalizers_2C.view(2, split.parts, -1)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(hidden_NH, weight_VH, teacher_NH, normalizers_2RN)
            ctx.target, ctx.split = target, split
        return found_RN * target.temperature**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        hidden_NH, weight_VH, teacher_NH, normalizers_2RN = ctx.saved_tensors
        target: Target = ctx.target
        split: Split = ctx.split
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        grad_hidden_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if wants_weight else None
        for span in split.spans(hidden_NH.shape[0]):
            own_C, theirs_C = normalizers_2RN[:, :, span].flatten(1)
            rows_CH = split.gather(hidden_NH[span])
            taught_CH = split.gather(teacher_NH[span])
            grad_CV = target.log_probabilities(rows_CH, weight_VH, own_C).exp_()
            grad_CV -= target.log_probabilities(taught_CH, target.weight_VH, theirs_C).exp_()
            grad_CV *= (grads[0][:, span].flatten() * target.temperature).unsqueeze(1)
            narrow_CV = grad_CV.to(weight_VH.dtype)
            if grad_hidden_NH is not None:
                grad_hidden_NH[span] = split.reduce(narrow_CV @ weight_VH)
            if grad_weight_VH is not None:
                add_product(grad_weight_VH, narrow_CV.t(), rows_CH)
            del grad_CV, narrow_CV  # before the next chunk's are made
        if grad_weight_VH is not None:
            grad_weight_VH = grad_weight_VH.to(weight_VH.dtype)
        return grad_hidden_NH, grad_weight_VH, None, None, None


def _normalize(student_CV: Tensor, teacher_CV: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Turn logits into log-probabilities, in place; returns what was taken off, (2, C)."""
    largest_2C = torch.stack([student_CV.amax(dim=1), teacher_CV.amax(dim=1)])
    largest_2C = _reduced(largest_2C, group, dist.ReduceOp.MAX)
    logits = (student_CV, teacher_CV)
    for logits_CV, largest_C in zip(logits, largest_2C, strict=True):
        logits_CV.sub_(largest_C.unsqueeze(1))
    totals_2C = _reduced(torch.stack([each_CV.exp().sum(dim=1) for each_CV in logits]), group)
    for logits_CV, total_C in zip(logits, totals_2C.log(), strict=True):
        logits_CV.sub_(total_C.unsqueeze(1))
    return largest_2C + totals_2C.log()


def _terms(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
    """q - p - p * (log q - log p) for log-probabilities log q (student) and log p: never negative,
    and over the whole vocabulary their sum is the divergence, as q and p sum to one alike.

    q - p is made from the larger one and the ratio, so nothing overflows and close numbers keep
    the digits of their difference.
    """
    apart_CV = student_CV - teacher_CV
    difference_CV = torch.expm1(-apart_CV.abs()).neg_().copysign_(apart_CV)
    difference_CV *= torch.maximum(student_CV, teacher_CV).exp_()
    return difference_CV.sub_(apart_CV.mul_(teacher_CV.exp()))


def _reduced(
    values: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
) -> Tensor:
    if group.size() > 1:
        dist.all_reduce(values, op=op, group=group)
    return values
