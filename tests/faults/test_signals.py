"""SIGTERM to the process groups of all ranks while they save, as Slurm and the supervisor send it.

The save is completed, the receipt says `incomplete`, and going on from it is as if nothing was.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import exit_codes
from megatron_vl.engine.checkpoint_writer import digest_of
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.train.checkpoint import latest, read_state
from tests.conftest import DRAWN, SmallData
from tests.faults.conftest import Ended, Warm
from tests.faults.killing import SETTINGS, TINY_MODEL
from tests.train.test_resume import assert_same

pytestmark = pytest.mark.distributed

STEPS = 12


def submit(warm: Warm, run: Path, data: str, *overrides: str) -> Ended:
    settings = [data, *SETTINGS, *TINY_MODEL, f"train.steps={STEPS}", *overrides]
    return warm.mvl("submit", DRAWN, "--run", run, "--follow", *settings)


@pytest.fixture(scope="module")
def straight(
    warm: Warm, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> StageFolder:
    run = tmp_path_factory.mktemp("straight") / "run"
    ended = submit(warm, run, small_data.override)
    assert ended.code == exit_codes.OK, ended.said
    return RunFolder(run).stages()[0]


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param("true", id="beside-training"),
        pytest.param("false", id="at-once", marks=pytest.mark.slow),
    ],
)
def test_a_signal_in_a_save_loses_nothing(
    warm: Warm, small_data: SmallData, straight: StageFolder, tmp_path: Path, beside: str
) -> None:
    run, ended = RunFolder(tmp_path / "run"), []
    caught_before_rename: list[bool] = []

    def train() -> None:
        setting = f"checkpoint.async_save={beside}"
        ended.append(submit(warm, run.path, small_data.override, setting))

    thread = threading.Thread(target=train)
    thread.start()
    wait_for(lambda: any(e["event"] == "started" for e in run.journal.read()), thread)
    stage = run.stages()[0]
    wait_for(lambda: any(stage.checkpoints.glob("step_*.partial")), thread)
    started = next(event for event in run.journal.read() if event["event"] == "started")
    for pid in started["pids"]:
        os.killpg(pid, signal.SIGTERM)
    caught_before_rename.append(any(stage.checkpoints.glob("step_*.partial")))
    thread.join(timeout=120)
    assert not thread.is_alive()
    assert ended[0].code == exit_codes.INCOMPLETE, ended[0].said
    assert caught_before_rename == [True]
    receipt = stage.receipt()
    assert receipt is not None
    assert (receipt.status, receipt.step < STEPS) == ("incomplete", True)
    assert "SIGTERM" in receipt.reason
    assert not any(stage.checkpoints.glob("step_*.partial"))
    newest = latest(stage.checkpoints)
    assert newest is not None
    state = read_state(newest)
    assert state.step == receipt.step
    assert len(state.files) == 5  # a shard of each rank, the index and two of megatron-core
    for name, digest in state.files.items():
        assert digest_of(newest / name) == digest

    again = warm.mvl("resume", run.path, "--follow")
    assert again.code == exit_codes.OK, again.said
    assert f"goes on after step {receipt.step}" in again.said
    assert losses(stage) == losses(straight)
    ends = [one.checkpoints / f"step_{STEPS:06d}" for one in (straight, stage)]
    assert_same(*ends)


def losses(stage: StageFolder) -> list[tuple[int, float, float]]:
    lines = step_lines(read_metrics(stage.metrics_path))
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def wait_for(seen: Callable[[], bool], thread: threading.Thread) -> None:
    deadline = time.monotonic() + 120
    while not seen():
        assert thread.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)
