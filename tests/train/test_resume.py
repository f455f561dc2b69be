"""A stage that was cut off goes on where it stood, also between its last save and its receipt."""

import shutil
from pathlib import Path

import pytest
import torch

from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.train.checkpoint import full_tensors, step_folder
from tests.conftest import DRAWN, TINY, SmallData
from tests.support.ranks import RankPool
from tests.train.stage_jobs import run_stage

pytestmark = pytest.mark.distributed


def make_run(path: Path, overrides: list[str]) -> StageFolder:
    run = RunFolder(path)
    run.create({"stages": [{"name": "init", "folder": "00_init"}]})
    (stage,) = run.stages()
    stage.config_path.write_text(to_yaml(load_stage(DRAWN, overrides)))
    return stage


def assert_same(one: Path, other: Path) -> None:
    first, second = full_tensors(one, optimizer=True), full_tensors(other, optimizer=True)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("optimizer", [True, False], ids=["with-optimizer", "weights-only"])
def test_a_stage_cut_off_before_its_receipt_writes_it_and_keeps_its_checkpoint(
    ranks: RankPool, small_data: SmallData, tmp_path: Path, optimizer: bool
) -> None:
    """Every step ran and was saved, then the process died. The stage after may want the moments."""
    overrides = [
        small_data.override,
        *TINY,
        "train.steps=2",
        "evaluation.every=0",
        f"checkpoint.optimizer={str(optimizer).lower()}",
    ]
    stage = make_run(tmp_path / "run", overrides)
    assert ranks.run(1, run_stage, tmp_path / "run", "init")[0][0] == 0
    last = step_folder(stage.checkpoints, 2)
    receipt = stage.receipt()
    assert receipt is not None
    assert receipt.done
    kept = tmp_path / "kept"
    shutil.copytree(last, kept)
    stage.receipt_path.unlink()
    step, said = ranks.run(1, run_stage, tmp_path / "run", "init")[0]
    assert step == 2
    assert "goes on after step 2" in said
    again = stage.receipt()
    assert again is not None
    assert again.done
    assert (again.step, again.data_cursor) == (receipt.step, receipt.data_cursor)
    assert_same(kept, last)
    names = full_tensors(last, optimizer=True)
    assert any(name.startswith("optimizer.") for name in names) == optimizer


def test_a_stage_goes_on_from_its_newest_save(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Cut off after step 1 of 2: the same weights and moments as without the cut, bit for bit."""
    overrides = [
        small_data.override,
        *TINY,
        "train.steps=2",
        "evaluation.every=0",
        "checkpoint.every=1",
    ]
    straight, cut = (make_run(tmp_path / name, overrides) for name in ("straight", "cut"))
    ranks.run(1, run_stage, tmp_path / "straight", "init")
    early = step_folder(straight.checkpoints, 1)
    early.rename(_made(step_folder(cut.checkpoints, 1)))
    step, said = ranks.run(1, run_stage, tmp_path / "cut", "init")[0]
    assert step == 1
    assert "step_000001" in said
    assert_same(step_folder(straight.checkpoints, 2), step_folder(cut.checkpoints, 2))


def _made(folder: Path) -> Path:
    folder.parent.mkdir(parents=True)
    return folder
