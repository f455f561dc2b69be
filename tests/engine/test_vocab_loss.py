"""The chunked loss against megatron-core's over full logits, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.vocab_loss_jobs import Head, Results, both, head, memory, without_gradients
from tests.support.ranks import RankPool

LAYOUTS = [(1, False), (2, False), (2, True)]


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def in_double(inputs: Head) -> Results:
    """torch's own cross-entropy over full logits in float64."""
    hidden = inputs.hidden_LBH.double().requires_grad_()
    weight = inputs.weight_VH.double().requires_grad_()
    logits_BVL = (hidden @ weight.t()).permute(1, 2, 0)
    losses = F.cross_entropy(logits_BVL, inputs.labels_BL, reduction="none")
    losses.backward(inputs.grad_BL.double())
    assert hidden.grad is not None
    assert weight.grad is not None
    return Results(losses.detach(), hidden.grad, weight.grad)


@pytest.mark.distributed
@pytest.mark.parametrize(("tensor", "sequence"), LAYOUTS)
@pytest.mark.parametrize(("batch", "chunk"), [(1, 8), (1, 1), (2, 10_000)])
def test_equals_megatron_core_over_full_logits(
    ranks: RankPool, tensor: int, sequence: bool, batch: int, chunk: int
) -> None:
    """Chunks that do not divide the tokens, of one token, and one chunk for all."""
    inputs = head(44, batch, 24, 96, torch.float32)
    results = ranks.run(tensor, both, inputs, tensor, sequence, chunk)
    exact = in_double(inputs)
    for chunked, full in results:
        for ours, theirs in zip(chunked, full, strict=True):
            assert ours.shape == theirs.shape
            assert distance(ours, theirs) < 1e-6
        assert distance(chunked.losses, exact.losses) < 1e-6
    chunked = [chunked for chunked, _ in results]
    assert distance(torch.cat([one.weight for one in chunked]), exact.weight) < 1e-6
    if sequence:
        assert distance(torch.cat([one.hidden for one in chunked]), exact.hidden) < 1e-6
    else:
        for one in chunked:
            assert distance(one.hidden, exact.hidden) < 1e-6


@pytest.mark.distributed
def test_bfloat16_sums_the_weight_gradient_in_float32(ranks: RankPool) -> None:
    """Many chunks of one token: adding them up in bfloat16 would lose most of the digits."""
    inputs = head(512, 1, 16, 64, torch.bfloat16)
    ((chunked, _),) = ranks.run(1, both, inputs, 1, False, 1)
    exact = in_double(inputs)
    assert chunked.weight.dtype == chunked.hidden.dtype == torch.bfloat16
    assert chunked.losses.dtype is torch.float32
    # Logits are kept in float32, so the losses do not feel the precision of the inputs.
    assert distance(chunked.losses, exact.losses) < 1e-5
    # One rounding of 2^-9 in the gradient of the logits, one of the result.
    assert distance(chunked.weight, exact.weight) < 4e-3
    assert distance(chunked.hidden, exact.hidden) < 4e-3


@pytest.mark.distributed
def test_full_logits_never_exist(ranks: RankPool) -> None:
    length, hidden, rows, chunk = 4096, 16, 512, 64
    inputs = head(length, 1, hidden, rows, torch.float32)
    ((kept, peak),) = ranks.run(1, memory, inputs, chunk)
    # Largest logit and sum of each token; the hidden states, weight and labels are the inputs.
    assert kept == 2 * 4 * length
    gradients = 4 * hidden * (length + rows)
    small = 8 * 4 * length
    logits = 4 * chunk * rows
    assert gradients + logits <= peak < gradients + 1.5 * logits + small
    assert peak < 4 * length * rows / 8


@pytest.mark.distributed
def test_nothing_is_kept_without_gradients(ranks: RankPool) -> None:
    ((losses, found),) = ranks.run(1, without_gradients, head(40, 1, 16, 64, torch.float32))
    assert not found
    assert torch.isfinite(losses).all()
