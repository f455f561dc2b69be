"""`kill -9` of ranks and launchers at random moments, then `mvl resume`: as if nothing had been.

MVL_KILLS sets how many the long test makes (60), MVL_KILL_SEED where they fall.
"""

import os
from pathlib import Path

import pytest

from tests.conftest import SmallData
from tests.faults.conftest import Warm

pytestmark = pytest.mark.distributed


def kill_and_compare(warm: Warm, small_data: SmallData, folder: Path, kills: int) -> None:
    seed = int(os.environ.get("MVL_KILL_SEED", "7"))
    answer = warm.kills(small_data.root, folder / "runs", kills, seed)
    made, found = answer["made"], answer["found"]
    print(found)
    assert len(made) == kills
    assert sum(kill["save"] != "" for kill in made) >= kills / 3
    assert found["attempts"] == kills + 1
    assert found["same_names"]
    assert found["tensors"] == found["equal_tensors"] > 100
    assert found["equal_losses"]
    assert found["equal_batches"]
    # Something was really lost and done again.
    assert found["steps_run"] > found["steps"] > kills


def test_a_few_kills_leave_no_trace(warm: Warm, small_data: SmallData, tmp_path: Path) -> None:
    kill_and_compare(warm, small_data, tmp_path, 6)


@pytest.mark.slow
def test_many_kills_leave_no_trace(warm: Warm, small_data: SmallData, tmp_path: Path) -> None:
    kill_and_compare(warm, small_data, tmp_path, int(os.environ.get("MVL_KILLS", "60")))
