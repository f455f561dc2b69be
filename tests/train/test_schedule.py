"""The learning rate, value by value."""

import math

import pytest

from megatron_vl.config.schema import OptimizerConfig
from megatron_vl.train.schedule import learning_rate


def rates(steps: int, **changes: float) -> list[float]:
    optimizer = OptimizerConfig(**{"lr": 8e-4, "min_lr": 1e-5, "warmup_fraction": 0.1, **changes})
    return [learning_rate(optimizer, step, steps) for step in range(steps)]


def test_warm_up_rises_in_equal_steps_to_the_peak() -> None:
    warm = rates(40)[:4]
    assert warm == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4], rel=1e-15)
    assert warm[3] == 8e-4


def test_decay_is_half_a_cosine_down_to_the_floor() -> None:
    all_rates = rates(40)
    assert all_rates[-1] == pytest.approx(1e-5, rel=1e-12)
    # Half way through the 36 steps of decay.
    assert all_rates[4 + 17] == pytest.approx((8e-4 + 1e-5) / 2, rel=1e-12)
    for step in (5, 11, 30):
        angle = math.pi * (step - 4 + 1) / 36
        expected = 1e-5 + (8e-4 - 1e-5) * (1 + math.cos(angle)) / 2
        assert all_rates[step] == pytest.approx(expected, rel=1e-12)
    decay = all_rates[3:]
    assert decay == sorted(decay, reverse=True)
    assert len(set(decay)) == len(decay)


def test_without_warm_up_the_decay_begins_at_once() -> None:
    all_rates = rates(10, warmup_fraction=0.0, min_lr=0.0)
    assert all_rates[0] == pytest.approx(8e-4 * (1 + math.cos(math.pi / 10)) / 2, rel=1e-12)
    assert all_rates[-1] == 0.0


def test_warm_up_over_the_whole_stage_ends_at_the_peak() -> None:
    all_rates = rates(10, warmup_fraction=1.0)
    assert all_rates == pytest.approx([8e-5 * (step + 1) for step in range(10)], rel=1e-12)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 1.0])
def test_a_stage_of_one_step_has_a_rate(fraction: float) -> None:
    (only,) = rates(1, warmup_fraction=fraction)
    assert 1e-5 <= only <= 8e-4
