"""What ranks do in the tests of the chunked divergence."""

from typing import NamedTuple

import torch
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.vocab_divergence import Target
from megatron_vl.engine.vocab_loss import Split
from tests.support.memory import LiveBytes, SavedBytes


class Pair(NamedTuple):
    """Hidden states (L, B, H) and output matrices (V, H) of student and teacher, whole."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    grad_BL: Tensor


class Found(NamedTuple):
    """Divergences (B, L), gradient of this rank's hidden states, and of its rows."""

    divergences: Tensor
    hidden: Tensor
    weight: Tensor


def pair(length: int, batch: int, hidden: int, rows: int, apart: float, dtype: torch.dtype) -> Pair:
    """A random teacher with large logits, and a student so far from it."""
    generator = torch.Generator().manual_seed(length * rows)

    def near(tensor: Tensor) -> Tensor:
        return tensor + apart * torch.randn(tensor.shape, generator=generator)

    states = 3 * torch.randn(length, batch, hidden, generator=generator)
    matrix = torch.randn(rows, hidden, generator=generator)
    gradient = torch.randn(batch, length, generator=generator)
    gradient[0, 1:3] = 0
    tensors = (near(states), near(matrix), states, matrix)
    return Pair(*(tensor.to(dtype) for tensor in tensors), gradient)


def chunked(inputs: Pair, tensor: int, sequence: bool, chunk: int, temperature: float) -> Found:
    """On this rank of `tensor`."""
    groups = process_groups.create(ParallelConfig(tensor=tensor, sequence=sequence), seed=0)
    rank = groups.tp.rank()

    def states(whole: Tensor) -> Tensor:
        return whole.chunk(tensor)[rank] if sequence else whole

    hidden = states(inputs.hidden).clone().requires_grad_()
    weight = inputs.weight.chunk(tensor)[rank].clone().requires_grad_()
    rows = inputs.teacher_weight.chunk(tensor)[rank]
    target = Target(states(inputs.teacher_hidden), rows, temperature)
    found = target.divergence(hidden, weight, Split(groups.tp, sequence, chunk))
    found.backward(inputs.grad_BL)
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(found.detach(), hidden.grad, weight.grad)


def memory(inputs: Pair, chunk: int) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the most alive during both, beyond the inputs."""
    groups = process_groups.create(ParallelConfig(), seed=0)
    hidden = inputs.hidden.clone().requires_grad_()
    weight = inputs.weight.clone().requires_grad_()
    known = [hidden, weight, inputs.teacher_hidden, inputs.teacher_weight, inputs.grad_BL]
    with LiveBytes(known) as live:
        with SavedBytes(known) as saved:
            target = Target(inputs.teacher_hidden, inputs.teacher_weight)
            found = target.divergence(hidden, weight, Split(groups.tp, False, chunk))
        found.backward(inputs.grad_BL)
    return saved.total, live.peak
