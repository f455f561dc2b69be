"""Damaged checkpoints: put aside with a reason after two looks, never silently."""

import json
import shutil
from pathlib import Path

import pytest

from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.train import checkpoint_check
from megatron_vl.train.checkpoint import STATE_FILE, read_state, step_folder
from tests.conftest import TINY, SmallData
from tests.support.ranks import RankFailed, RankPool
from tests.train.stage_jobs import run_stage
from tests.train.test_resume import assert_same, make_run

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def whole(ranks: RankPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A done run that saved after each of its three steps."""
    path = tmp_path_factory.mktemp("whole") / "run"
    make_run(path, overrides(small_data))
    ranks.run(1, run_stage, path, "init")
    return path


def overrides(small_data: SmallData) -> list[str]:
    return [
        small_data.override,
        *TINY,
        "train.steps=3",
        "evaluation.every=0",
        "checkpoint.every=1",
    ]


def cut_off(whole: Path, path: Path) -> StageFolder:
    """The same run before its last save and its receipt."""
    shutil.copytree(whole, path)
    stage = RunFolder(path).stage("init")
    stage.receipt_path.unlink()
    shutil.rmtree(step_folder(stage.checkpoints, 3))
    return stage


def largest(folder: Path) -> Path:
    return max(folder.iterdir(), key=lambda path: path.stat().st_size)


def cut_short(folder: Path) -> str:
    path = largest(folder)
    with path.open("rb+") as file:
        file.truncate(path.stat().st_size // 2)
    return path.name


def flip_a_bit(folder: Path) -> str:
    path = largest(folder)
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 3)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    return path.name


def lose_a_file(folder: Path) -> str:
    path = largest(folder)
    path.unlink()
    return path.name


def break_the_marker(folder: Path) -> str:
    (folder / STATE_FILE).write_text('{"step": ')
    return STATE_FILE


@pytest.mark.parametrize(
    "harm",
    [cut_short, flip_a_bit, break_the_marker, pytest.param(lose_a_file, marks=pytest.mark.slow)],
    ids=lambda harm: harm.__name__,
)
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_it_used(
    ranks: RankPool, whole: Path, tmp_path: Path, harm: object
) -> None:
    assert callable(harm)
    stage = cut_off(whole, tmp_path / "run")
    newest = step_folder(stage.checkpoints, 2)
    name = harm(newest)
    step, said = ranks.run(1, run_stage, tmp_path / "run", "init")[0]
    assert step == 1
    assert f"{newest.name} failed to load twice: " in said
    assert name in said
    aside = stage.checkpoints / "step_000002.quarantined"
    assert (aside / "REASON.txt").read_text().strip() in said
    event = RunFolder(tmp_path / "run").journal.read()[-3]
    assert (event["event"], event["stage"]) == ("quarantined", "init")
    assert name in event["reason"]
    for number in (2, 3):
        original = step_folder(RunFolder(whole).stage("init").checkpoints, number)
        assert_same(original, step_folder(stage.checkpoints, number))


def test_a_second_look_may_find_it_whole(ranks: RankPool, whole: Path, tmp_path: Path) -> None:
    stage = cut_off(whole, tmp_path / "run")
    assert ranks.run(1, look_badly_once, tmp_path / "run") == [(True, [])]
    assert step_folder(stage.checkpoints, 2).is_dir()


def look_badly_once(path: Path) -> tuple[bool, list[str]]:
    """A storage that fails to give a file on the first look alone."""
    run = RunFolder(path)
    stage = run.stage("init")
    real, calls = checkpoint_check.digest_of, []

    def flaky(file: Path) -> str:
        calls.append(file)
        if len(calls) == 1:
            raise OSError("Input/output error")
        return real(file)

    checkpoint_check.digest_of = flaky
    try:
        found, quarantined = checkpoint_check.usable_checkpoint(run, stage)
    finally:
        checkpoint_check.digest_of = real
    return found == step_folder(stage.checkpoints, 2), quarantined


def test_another_model_is_not_the_checkpoint_s_fault(
    ranks: RankPool, small_data: SmallData, whole: Path, tmp_path: Path
) -> None:
    stage = cut_off(whole, tmp_path / "run")
    other = make_run(
        tmp_path / "other", [*overrides(small_data), "model.decoder.ffn_hidden_size=256"]
    )
    shutil.copy(other.config_path, stage.config_path)
    with pytest.raises(RankFailed, match=r"step_000002 does not fit this model"):
        ranks.run(1, run_stage, tmp_path / "run", "init")
    assert step_folder(stage.checkpoints, 2).is_dir()


def test_a_checkpoint_names_the_digest_of_each_of_its_files(whole: Path) -> None:
    folder = step_folder(RunFolder(whole).stage("init").checkpoints, 2)
    files = {path.name for path in folder.iterdir()}
    assert set(json.loads((folder / STATE_FILE).read_text())["files"]) == files - {STATE_FILE}
    assert read_state(folder).optimizer_layout == {"tensor": 1, "pipeline": 1}
