"""Asked to stop: every rank saves after the same step, and what follows is as if nothing was."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_vl.run.folder import RunError, RunFolder
from megatron_vl.run.stop import MARGIN_SECONDS, Stop, StopRequest, seconds_to_stop
from megatron_vl.train.checkpoint import step_folder
from tests.conftest import REPOSITORY, SmallData
from tests.support.ranks import RankFailed, RankPool
from tests.train.stop_jobs import run_until_asked
from tests.train.test_resume import assert_same, make_run

pytestmark = pytest.mark.distributed


def settings(small_data: SmallData) -> list[str]:
    """Two data-parallel ranks, four steps, nothing saved between."""
    return [
        small_data.override,
        "parallel.data=2",
        "train.global_batch=2",
        "data.sequence_length=256",
        "train.steps=4",
        "evaluation.every=0",
    ]


def test_all_ranks_stop_at_the_same_step_though_one_was_asked(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """And the stage's end is bitwise that of a stage nobody stopped."""
    straight = make_run(tmp_path / "straight", settings(small_data))
    stopped = make_run(tmp_path / "stopped", settings(small_data))
    asked = (tmp_path / "stopped", "init")
    assert ranks.run(2, run_until_asked, *asked, 3, 1, "terminated") == [(2, "terminated")] * 2
    receipt = stopped.receipt()
    assert receipt is not None
    assert (receipt.status, receipt.step, receipt.data_cursor) == ("incomplete", 2, 4)
    assert receipt.reason.endswith("Ctrl-C); stopped after step 2 of 4")
    assert receipt.checkpoint is None
    assert not step_folder(stopped.checkpoints, 4).exists()
    assert ranks.run(2, run_until_asked, *asked, 0, 0, "time_limit") == [(4, "none")] * 2
    assert ranks.run(2, run_until_asked, tmp_path / "straight", "init", 0, 0, "none")[0][0] == 4
    ended = stopped.receipt()
    assert ended is not None
    assert ended.done
    assert_same(step_folder(straight.checkpoints, 4), step_folder(stopped.checkpoints, 4))


def test_a_rank_asked_before_its_first_step_saves_nothing(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    stage = make_run(tmp_path / "run", settings(small_data))
    found = ranks.run(2, run_until_asked, tmp_path / "run", "init", 1, 0, "time_limit")
    assert found == [(0, "time_limit")] * 2
    receipt = stage.receipt()
    assert receipt is not None
    assert receipt.reason == "its time limit is near; stopped after step 0 of 4"
    assert list(stage.checkpoints.glob("*")) == []


def test_an_attempt_that_was_overtaken_writes_no_more(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    stage = make_run(tmp_path / "run", [*settings(small_data), "checkpoint.every=1"])
    stage.start_attempt()
    stage.start_attempt()
    with pytest.raises(RankFailed, match="attempt 2 has begun, so attempt 1 writes no more"):
        ranks.run(2, run_until_asked, tmp_path / "run", "init", 0, 0, "none")
    assert list(stage.checkpoints.glob("step_*")) == []
    assert stage.receipt() is None


def test_the_later_attempt_may_write(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({"stages": [{"name": "init", "folder": "00_init"}]})
    (stage,) = run.stages()
    first, second = stage.start_attempt(), stage.start_attempt()
    stage.require_current(second)
    with pytest.raises(RunError):
        stage.require_current(first)


def test_signals_wait_until_a_rank_looks_and_spare_what_it_started() -> None:
    """A handler would interrupt; and Slurm signals the whole group, helpers included."""
    program = (
        "import multiprocessing, os, signal, subprocess, sys, time\n"
        "from megatron_vl.run.stop import Stop, StopRequest\n"
        "stop = StopRequest(); stop.listen()\n"
        "helper = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=subprocess.PIPE)\n"
        "forked = os.fork()\n"
        "if not forked: time.sleep(0.5); os._exit(0)\n"
        "assert stop.look(None, 0.0) is Stop.none\n"
        "queue = multiprocessing.get_context('spawn').Manager().Queue()\n"
        "os.killpg(0, signal.SIGUSR1)\n"
        "assert stop.look(None, 0.0) is Stop.time_limit\n"
        "os.killpg(0, signal.SIGTERM); os.killpg(0, signal.SIGUSR1)\n"
        "assert stop.look(None, 0.0) is Stop.terminated\n"
        "time.sleep(0.5); queue.put('kept'); assert queue.get() == 'kept'\n"
        "helper.communicate(b'\\n')\n"
        "print(helper.returncode, os.waitpid(forked, 0)[1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        start_new_session=True,
        timeout=120,
    )
    assert (done.stdout, done.returncode) == ("0 0\n", 0), done.stderr


def test_the_clock_stops_a_job_in_time_for_what_its_saves_take() -> None:
    assert seconds_to_stop(save_seconds=40.0, step_seconds=5.0) == 90.0 + MARGIN_SECONDS
    for left, expected in ((120.0, Stop.none), (100.0, Stop.time_limit)):
        stop = StopRequest(job_end=time.time() + left, lead_seconds=1.0)
        assert stop.look(40.0, 5.0) is expected
    unmeasured = StopRequest(job_end=time.time() + 50, lead_seconds=60.0)
    assert unmeasured.look(None, 5.0) is Stop.time_limit
    assert StopRequest().look(1e6, 1e6) is Stop.none


def test_the_limit_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MVL_JOB_END", "1700000000")
    monkeypatch.setenv("MVL_LEAD_SECONDS", "60")
    stop = StopRequest.from_environment()
    assert (stop.job_end, stop.lead_seconds) == (1.7e9, 60.0)
    assert stop.look(None, 0.0) is Stop.time_limit
    monkeypatch.setenv("MVL_JOB_END", "")
    assert StopRequest.from_environment().job_end is None
