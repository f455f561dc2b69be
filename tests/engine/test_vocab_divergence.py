"""The chunked divergence against torch's own over full logits in float64, and what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.engine.divergence_jobs import Found, Pair, chunked, memory, pair
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def in_double(inputs: Pair, temperature: float) -> Found:
    hidden = inputs.hidden.double().requires_grad_()
    weight = inputs.weight.double().requires_grad_()
    student = F.log_softmax(hidden @ weight.t() / temperature, dim=-1)
    logits = inputs.teacher_hidden.double() @ inputs.teacher_weight.double().t() / temperature
    teacher = F.log_softmax(logits, dim=-1)
    terms_LBV = F.kl_div(student, teacher, reduction="none", log_target=True)
    found_BL = terms_LBV.sum(-1).t() * temperature**2
    found_BL.backward(inputs.grad_BL.double())
    assert hidden.grad is not None
    assert weight.grad is not None
    return Found(found_BL.detach(), hidden.grad, weight.grad)


@pytest.mark.parametrize(("tensor", "sequence"), [(1, False), (2, False), (2, True)])
@pytest.mark.parametrize(
    ("batch", "chunk", "temperature", "apart"), [(1, 8, 1.0, 1.0), (1, 1, 2.5, 0.1), (2, 99, 1, 3)]
)
def test_equals_torch_over_full_logits(
    ranks: RankPool,
    tensor: int,
    sequence: bool,
    batch: int,
    chunk: int,
    temperature: float,
    apart: float,
) -> None:
    """Chunks that do not divide the tokens, of one token, and one chunk for all; near and far."""
    inputs = pair(44, batch, 24, 96, apart, torch.float32)
    exact = in_double(inputs, temperature)
    found = ranks.run(tensor, chunked, inputs, tensor, sequence, chunk, temperature)
    for one in found:
        assert distance(one.divergences, exact.divergences) < 1e-5
    assert distance(torch.cat([one.weight for one in found]), exact.weight) < 1e-5
    if sequence:
        assert distance(torch.cat([one.hidden for one in found]), exact.hidden) < 1e-5
    else:
        for one in found:
            assert distance(one.hidden, exact.hidden) < 1e-5


def test_a_small_divergence_keeps_its_digits(ranks: RankPool) -> None:
    """About 1e-7: the difference of two cross-entropies in float32 would have none left."""
    inputs = pair(64, 1, 16, 512, 1e-4, torch.float32)
    exact = in_double(inputs, 1.0)
    assert float(exact.divergences.max()) < 1e-5
    (found,) = ranks.run(1, chunked, inputs, 1, False, 16, 1.0)
    assert bool((found.divergences >= 0).all())
    assert distance(found.divergences, exact.divergences) < 1e-2


def test_a_student_sure_of_what_its_teacher_rules_out(ranks: RankPool) -> None:
    """Log-probabilities hundreds apart, both ways: nothing overflows."""
    inputs = pair(16, 1, 8, 32, 0.5, torch.float32)
    inputs = inputs._replace(hidden=-30 * inputs.hidden, teacher_hidden=30 * inputs.teacher_hidden)
    exact = in_double(inputs, 1.0)
    assert float(exact.divergences.min()) > 100
    (found,) = ranks.run(1, chunked, inputs, 1, False, 16, 1.0)
    for ours, theirs in zip(found, exact, strict=True):
        assert distance(ours, theirs) < 1e-5


def test_full_logits_never_exist(ranks: RankPool) -> None:
    length, hidden, rows, chunk = 4096, 16, 512, 64
    inputs = pair(length, 1, hidden, rows, 0.1, torch.float32)
    ((kept, peak),) = ranks.run(1, memory, inputs, chunk)
    # What was taken off the logits of both.
    assert kept == 2 * 4 * length
    logits = 4 * chunk * rows
    assert peak < 4 * hidden * (length + rows) + 6 * logits + 8 * 4 * length
    assert peak < 4 * length * rows / 4
