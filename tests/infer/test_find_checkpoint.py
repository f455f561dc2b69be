"""Which checkpoint a path stands for."""

import shutil
from pathlib import Path

import pytest

from megatron_vl.infer.model import find_checkpoint
from megatron_vl.run.folder import RunError

pytestmark = pytest.mark.distributed

STAGE = Path("stages") / "01_stage0"
CHECKPOINT = STAGE / "checkpoints" / "step_000007"


def found(path: Path) -> tuple[Path, Path]:
    checkpoint, config = find_checkpoint(path)
    return checkpoint.resolve(), config.resolve()


def test_a_run_stands_for_its_last_done_stage(small_run: Path) -> None:
    """stage1 comes later in the plan, but it failed."""
    assert found(small_run) == (small_run / CHECKPOINT, small_run / STAGE / "config.yaml")


@pytest.mark.parametrize("path", [STAGE, CHECKPOINT], ids=["stage", "checkpoint"])
def test_a_stage_and_a_checkpoint_stand_for_themselves(small_run: Path, path: Path) -> None:
    assert found(small_run / path) == (small_run / CHECKPOINT, small_run / STAGE / "config.yaml")


@pytest.mark.parametrize(
    ("here", "path"),
    [
        (STAGE, "."),
        (STAGE, "checkpoints/step_000007"),
        (STAGE / "checkpoints", "step_000007"),
        (CHECKPOINT, "."),
        (Path(), "."),
    ],
    ids=str,
)
def test_relative_paths_stand_for_the_same(
    small_run: Path, monkeypatch: pytest.MonkeyPatch, here: Path, path: str
) -> None:
    monkeypatch.chdir(small_run / here)
    assert found(Path(path)) == (small_run / CHECKPOINT, small_run / STAGE / "config.yaml")


def test_a_stage_stands_for_its_newest_complete_checkpoint(small_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "01_stage0"
    shutil.copytree(small_run / STAGE, copy)
    (copy / "checkpoints" / "step_000009").mkdir()
    (copy / "checkpoints" / "step_000011.partial").mkdir()
    assert found(copy)[0] == copy / "checkpoints" / "step_000007"


def nowhere(run: Path) -> list[Path]:
    return [
        run / "stages" / "02_stage1",
        run / "stages",
        run / "nowhere",
        run / CHECKPOINT / "state.json",
        run / STAGE / "checkpoints" / "step_000099",
        run / STAGE / "attempts" / "1",
    ]


@pytest.mark.parametrize("number", range(6))
def test_what_is_no_checkpoint_is_refused_with_what_would_be(small_run: Path, number: int) -> None:
    path = nowhere(small_run)[number]
    with pytest.raises(RunError, match="step_NNNNNN") as raised:
        find_checkpoint(path)
    assert str(path) in str(raised.value)


def test_a_run_with_nothing_done_says_so(small_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(small_run, copy)
    for receipt in copy.glob("stages/*/receipt.json"):
        receipt.unlink()
    with pytest.raises(RunError, match="no stage of this run is done yet; `mvl status"):
        find_checkpoint(copy)
