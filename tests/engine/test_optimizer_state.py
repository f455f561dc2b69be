"""Optimizer state of torch's AdamW after a checkpoint was loaded."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.engine import optimizer_state
from tests.conftest import LAPTOP, TINY, SmallData
from tests.support.ranks import RankPool
from tests.train import jobs

pytestmark = pytest.mark.distributed
FILE = LAPTOP / "stage1.yaml"
STEPS = 2


def loaded_steps(overrides: list[str], checkpoint: Path) -> dict[str, object]:
    """Load a checkpoint, look at the step counts, train a step, look again."""
    config = load_stage(FILE, overrides)
    trainee = jobs.loaded(config, checkpoint)

    def seen() -> list[Tensor]:
        (part,) = optimizer_state._parts(trainee.optimizer)
        parameters = [p for group in part.optimizer.param_groups for p in group["params"]]
        assert parameters
        return [part.optimizer.state[parameter]["step"] for parameter in parameters]

    before = seen()
    places = len({tensor.data_ptr() for tensor in before})
    counts = [float(tensor) for tensor in before]
    jobs.steps(trainee, config, STEPS, STEPS + 1)
    return {"places": places, "before": counts, "after": [float(t) for t in seen()]}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_parameter_counts_its_own_steps(
    ranks: RankPool, small_data: SmallData, tmp_path: Path, precision: str
) -> None:
    """Shared step tensors would advance once a parameter; lost ones would start over at 0."""
    overrides = [
        small_data.override,
        *TINY,
        f"precision={precision}",
    ]
    folder = tmp_path / "step_000002"
    ranks.run(1, jobs.train_and_save, FILE, overrides, STEPS, folder)
    seen = ranks.run(1, loaded_steps, overrides, folder)[0]
    number = len(seen["before"])
    assert number > 100
    assert seen["before"] == [float(STEPS)] * number
    assert seen["places"] == number
    assert seen["after"] == [float(STEPS + 1)] * number


def test_allocate_gives_zero_state_and_keeps_what_is_there(
    ranks: RankPool, small_data: SmallData
) -> None:
    overrides = [
        small_data.override,
        *TINY,
    ]
    fresh, kept = ranks.run(1, allocated, overrides)[0]
    assert fresh == {"exp_avg": 0.0, "exp_avg_sq": 0.0, "step": 0.0}
    assert kept


def allocated(overrides: list[str]) -> tuple[dict[str, float], bool]:
    """The largest entries right after `allocate`; whether it leaves a trained state alone."""
    config = load_stage(FILE, overrides)
    trainee = jobs.drawn(config)
    optimizer_state.allocate(trainee.optimizer)
    (part,) = optimizer_state._parts(trainee.optimizer)
    states = list(part.optimizer.state.values())
    largest = {kind: max(float(s[kind].abs().max()) for s in states) for kind in states[0]}
    jobs.steps(trainee, config, 0, 1)
    before = [state["exp_avg"].clone() for state in states]
    assert max(float(moment.abs().max()) for moment in before) > 0
    optimizer_state.allocate(trainee.optimizer)
    kept = all(torch.equal(s["exp_avg"], b) for s, b in zip(states, before, strict=True))
    return largest, kept
