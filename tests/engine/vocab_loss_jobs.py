"""What ranks do in the tests of the chunked loss: the same loss twice, chunked and in full."""

from typing import NamedTuple

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.vocab_loss import Split, chunked_cross_entropy
from tests.support.memory import LiveBytes, SavedBytes


class Head(NamedTuple):
    """Inputs of the head, whole, the same on every rank."""

    hidden_LBH: Tensor
    weight_VH: Tensor
    labels_BL: Tensor
    grad_BL: Tensor


class Results(NamedTuple):
    """Losses (B, L), gradient of this rank's hidden states, and of its rows of the matrix."""

    losses: Tensor
    hidden: Tensor
    weight: Tensor


def head(length: int, batch: int, hidden: int, rows: int, dtype: torch.dtype) -> Head:
    """Random inputs with large logits, labels in every rank's rows, and weights of 0 among others.

    The labels of the first and last row, and the largest logit, sit at the ends of parts.
    """
    generator = torch.Generator().manual_seed(length * rows)
    labels_BL = torch.randint(0, rows, (batch, length), generator=generator)
    labels_BL[0, 0], labels_BL[-1, -1] = 0, rows - 1
    grad_BL = torch.randn(batch, length, generator=generator)
    grad_BL[0, 1:3] = 0
    return Head(
        (3 * torch.randn(length, batch, hidden, generator=generator)).to(dtype),
        torch.randn(rows, hidden, generator=generator).to(dtype),
        labels_BL,
        grad_BL,
    )


def both(inputs: Head, tensor: int, sequence: bool, chunk: int) -> tuple[Results, Results]:
    """Chunked and in full on this rank of `tensor`."""
    groups = process_groups.create(ParallelConfig(tensor=tensor, sequence=sequence), seed=0)
    rank = groups.tp.rank()
    found = []
    for chunked in (True, False):
        hidden = inputs.hidden_LBH.chunk(tensor)[rank] if sequence else inputs.hidden_LBH
        hidden = hidden.clone().requires_grad_()
        weight = inputs.weight_VH.chunk(tensor)[rank].clone().requires_grad_()
        if chunked:
            split = Split(groups.tp, sequence, chunk)
            losses = chunked_cross_entropy(hidden, weight, inputs.labels_BL, split)
        else:
            losses = _in_full(hidden, weight, inputs.labels_BL, sequence)
        losses.backward(inputs.grad_BL)
        assert hidden.grad is not None
        assert weight.grad is not None
        found.append(Results(losses.detach(), hidden.grad, weight.grad))
    return found[0], found[1]


def _in_full(hidden: Tensor, weight: Tensor, labels_BL: Tensor, sequence: bool) -> Tensor:
    """megatron-core's loss over all logits, and its own mappings between tensor ranks."""
    if sequence:
        hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=True)
    else:
        hidden = copy_to_tensor_model_parallel_region(hidden)
    logits_LBV = hidden @ weight.t()
    return vocab_parallel_cross_entropy(logits_LBV, labels_BL.t().contiguous()).t()


def memory(inputs: Head, chunk: int) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the most alive during both, beyond the inputs."""
    groups = process_groups.create(ParallelConfig(), seed=0)
    hidden = inputs.hidden_LBH.clone().requires_grad_()
    weight = inputs.weight_VH.clone().requires_grad_()
    known = [hidden, weight, inputs.labels_BL, inputs.grad_BL]
    with LiveBytes(known) as live:
        with SavedBytes(known) as saved:
            split = Split(groups.tp, False, chunk)
            losses = chunked_cross_entropy(hidden, weight, inputs.labels_BL, split)
        losses.backward(inputs.grad_BL)
    return saved.total, live.peak


def without_gradients(inputs: Head) -> tuple[Tensor, bool]:
    """Losses of inputs that ask for no gradient, and whether a graph hangs on them."""
    groups = process_groups.create(ParallelConfig(), seed=0)
    split = Split(groups.tp, False, 16)
    losses = chunked_cross_entropy(inputs.hidden_LBH, inputs.weight_VH, inputs.labels_BL, split)
    return losses, losses.grad_fn is not None
