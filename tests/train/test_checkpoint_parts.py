"""Saves inside a stage: each data rank's part of the optimizer state, and where it loads."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import StageFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.train.checkpoint import full_tensors, latest, read_state, step_folder
from megatron_vl.train.checkpoint_save import Saver, clear_unfinished
from tests.conftest import DRAWN, SmallData
from tests.support.ranks import RankFailed, RankPool
from tests.train import jobs
from tests.train.stage_jobs import run_stage
from tests.train.test_resume import assert_same, make_run

pytestmark = pytest.mark.distributed

STEPS = 3
CUT = 2


def settings(small_data: SmallData, *overrides: str) -> list[str]:
    return [
        small_data.override,
        "parallel.data=2",
        "train.global_batch=2",
        "data.sequence_length=256",
        f"train.steps={STEPS}",
        "evaluation.every=0",
        "checkpoint.every=1",
        *overrides,
    ]


def losses(stage: StageFolder) -> list[float]:
    return [line["loss"] for line in step_lines(read_metrics(stage.metrics_path))]


def cut_off(straight: StageFolder, path: Path, overrides: list[str]) -> StageFolder:
    """A run that stands where the other one stood after its save at step CUT."""
    stage = make_run(path, overrides)
    stage.checkpoints.mkdir()
    early = step_folder(straight.checkpoints, CUT)
    shutil.copytree(early, stage.checkpoints / early.name)
    return stage


DELAYED = ("precision=fp8_delayed", "fp8.amax_history=4")


@pytest.fixture(scope="module")
def straight(
    ranks: RankPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> StageFolder:
    """A whole stage over two data ranks, in FP8 with a history."""
    path = tmp_path_factory.mktemp("straight") / "run"
    stage = make_run(path, settings(small_data, *DELAYED))
    ranks.run(2, run_stage, path, "init")
    return stage


def test_parts_go_on_bitwise_at_their_layout(
    ranks: RankPool, small_data: SmallData, straight: StageFolder, tmp_path: Path
) -> None:
    """Weights, moments and the amax history of delayed FP8 scaling."""
    early, end = (step_folder(straight.checkpoints, step) for step in (CUT, STEPS))
    assert read_state(early).optimizer_layout == {"tensor": 1, "pipeline": 1}
    parts = full_tensors(early, optimizer=True)
    assert any(name.startswith("optimizer.distributed.") for name in parts)
    assert any(name.startswith("fp8.amax_history.") for name in parts)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in parts.values())
    assert read_state(end).optimizer_layout == {}
    again = cut_off(straight, tmp_path / "again", settings(small_data, *DELAYED))
    assert [step for step, _ in ranks.run(2, run_stage, tmp_path / "again", "init")] == [CUT] * 2
    assert losses(again) == losses(straight)[CUT:]
    assert_same(end, step_folder(again.checkpoints, STEPS))


def test_parts_load_at_other_data_ranks(
    ranks: RankPool, small_data: SmallData, straight: StageFolder, tmp_path: Path
) -> None:
    overrides = settings(small_data, *DELAYED, "parallel.data=1")
    alone = cut_off(straight, tmp_path / "alone", overrides)
    ranks.run(1, run_stage, tmp_path / "alone", "init")
    # Another order of additions, rounded to 8 bits on the way.
    assert losses(alone) == pytest.approx(losses(straight)[CUT:], rel=1e-3)


TENSOR = ("parallel.data=1", "parallel.tensor=2", "parallel.sequence=true")


def test_parts_are_refused_at_other_tensor_ranks(
    ranks: RankPool, small_data: SmallData, straight: StageFolder, tmp_path: Path
) -> None:
    cut_off(straight, tmp_path / "run", settings(small_data, *DELAYED, *TENSOR))
    said = (
        r"step_000002 was saved inside a stage: .* loads at parallel.tensor=1, "
        r"parallel.pipeline=1 alone .* this layout is parallel.tensor=2, parallel.pipeline=1; "
        r".*checkpoint.any_layout=true"
    )
    with pytest.raises(RankFailed, match=said):
        ranks.run(2, run_stage, tmp_path / "run", "init")


def test_saves_between_can_be_for_any_layout(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Stored as at a stage's end, whose loading elsewhere test_layouts covers."""
    overrides = settings(
        small_data, "checkpoint.any_layout=true", "parallel.data=1", "train.steps=2"
    )
    stage = make_run(tmp_path / "run", overrides)
    ranks.run(1, run_stage, tmp_path / "run", "init")
    between, end = (step_folder(stage.checkpoints, step) for step in (1, 2))
    assert read_state(between).optimizer_layout == {}
    assert full_tensors(between, optimizer=True).keys() == full_tensors(end, optimizer=True).keys()


def test_a_save_holds_the_weights_of_its_beginning_and_counts_when_it_is_complete(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    overrides = settings(small_data, "parallel.data=1", "train.global_batch=1")
    ranks.run(1, change_while_writing, overrides, tmp_path)


def change_while_writing(overrides: list[str], folder: Path) -> None:
    """Begin a save whose writing is held up, change every weight and moment, then let it end."""
    import threading

    from megatron_vl.engine.checkpoint_writer import ThreadWriter

    config = load_stage(DRAWN, overrides)
    trainee = jobs.drawn(config)
    jobs.steps(trainee, config, 0, 1)
    before: dict[str, Tensor] = {
        name: parameter.detach().float().clone()
        for name, parameter in trainee.module.named_parameters()
    }
    go_on, write = threading.Event(), ThreadWriter._write

    def held_up(writer: ThreadWriter, stream: object) -> None:
        assert go_on.wait(60)
        write(writer, stream)  # type: ignore[arg-type]

    ThreadWriter._write = held_up  # type: ignore[method-assign,assignment]
    try:
        saver = Saver(trainee, background=True)
        saver.begin(step_folder(folder, 1), jobs._state(config, 1))
        with torch.no_grad():
            for parameter in trainee.module.parameters():
                parameter.fill_(3.0)
        for part in trainee.optimizer.chained_optimizers:  # type: ignore[attr-defined]
            for state in part.optimizer.state.values():
                state["exp_avg"].fill_(5.0)
        assert saver.writing
        assert latest(folder) is None
        go_on.set()
        saved = saver.end()
    finally:
        ThreadWriter._write = write  # type: ignore[method-assign]
    assert latest(folder) == saved.folder
    assert saver.under_way is None
    stored = full_tensors(saved.folder, optimizer=True)
    compared = [name for name in before if name in stored]
    assert len(compared) > 50
    for name in compared:
        assert torch.equal(stored[name].float(), before[name]), name
    moments = [value for name, value in stored.items() if name.endswith(".exp_avg")]
    assert moments
    assert not any(bool((value == 5.0).any()) for value in moments)


def test_what_a_kill_leaves_is_no_checkpoint_and_is_cleared(tmp_path: Path) -> None:
    for name in ("step_000002.partial", "step_000001.replaced", "step_000001.quarantined"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state.json").write_text("{}")
    assert latest(tmp_path) is None
    clear_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.quarantined"]
