"""Ranks as processes: ended together, whatever ends first; never left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from launch.local import RankCommand, RankGroup, describe_end, rank_commands
from launch.reasons import last_lines
from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import RunFolder, StageFolder
from tests.launch.small_recipe import FAILS, LAPTOP, SLEEPS

STUBBORN = (
    "import signal, time; signal.signal(15, signal.SIG_IGN); print(1, flush=True); time.sleep(60)"
)
WITH_WORKER = (
    "import subprocess, sys, time\n"
    "worker = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "print(worker.pid, flush=True); time.sleep(60)"
)


def commands(folder: Path, *programs: str) -> list[RankCommand]:
    return [
        RankCommand([sys.executable, "-c", text], {"RANK": str(r)}, folder / f"rank_{r}.log")
        for r, text in enumerate(programs)
    ]


def wait_for(path: Path) -> str:
    for _ in range(100):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.05)
    raise AssertionError(f"{path} stayed empty")


def gone(pid: int) -> bool:
    for _ in range(60):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_all_ranks_end_well(tmp_path: Path) -> None:
    show = "import os; print('rank', os.environ['RANK'])"
    ticks = []
    with RankGroup(commands(tmp_path, show, show)) as group:
        result = group.wait(lambda: ticks.append(1))
    assert (result.codes, result.first_failed) == ([0, 0], None)
    assert (tmp_path / "rank_1.log").read_text() == "rank 1\n"
    assert (tmp_path / "log").read_text() == "rank 0\n"
    assert ticks


def test_one_dead_rank_ends_the_others(tmp_path: Path) -> None:
    with RankGroup(commands(tmp_path, SLEEPS, FAILS, SLEEPS), 5.0) as group:
        result = group.wait()
    assert result.first_failed == 1
    assert result.codes == [-signal.SIGTERM, 7, -signal.SIGTERM]
    assert last_lines(tmp_path / "rank_1.log") == "the disk is on fire"


def test_a_rank_that_ignores_the_request_is_killed(tmp_path: Path) -> None:
    with RankGroup(commands(tmp_path, STUBBORN), 0.3) as group:
        wait_for(tmp_path / "rank_0.log")
    assert all(gone(pid) for pid in group.pids)


def test_workers_of_a_rank_end_with_it(tmp_path: Path) -> None:
    with RankGroup(commands(tmp_path, WITH_WORKER), 2.0):
        worker = int(wait_for(tmp_path / "rank_0.log"))
        assert psutil.pid_exists(worker)
    assert gone(worker)


def test_a_program_that_does_not_exist_leaves_no_rank_behind(tmp_path: Path) -> None:
    good = commands(tmp_path, SLEEPS)
    group = RankGroup([*good, RankCommand(["/no/such/program"], {}, tmp_path / "x.log")], 1.0)
    with pytest.raises(FileNotFoundError), group:
        pass
    assert all(gone(pid) for pid in group.pids)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a service of the Linux kernel")
def test_a_rank_outlives_no_killed_supervisor(tmp_path: Path) -> None:
    rank = (
        "from launch.local import end_with_parent; import time; end_with_parent()\n"
        "print(1, flush=True); time.sleep(60)"
    )
    supervisor = (
        "import os, subprocess, sys, time\n"
        "env = {**os.environ, 'MVL_SUPERVISOR': str(os.getpid())}\n"
        f"log = open({str(tmp_path / 'log')!r}, 'w')\n"
        f"p = subprocess.Popen([sys.executable, '-c', {rank!r}], env=env, stdout=log)\n"
        "print(p.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", supervisor], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    wait_for(tmp_path / "log")
    process.kill()
    process.wait()
    process.stdout.close()
    assert gone(pid)


def test_every_rank_is_told_its_place(tmp_path: Path) -> None:
    config = load_stage(LAPTOP / "stage0.yaml", ["parallel.tensor=2", "parallel.data=2"])
    stage = StageFolder(tmp_path / "stages" / "00_stage0", "stage0")
    ranks = rank_commands(RunFolder(tmp_path), stage, config, 3)
    assert [command.env["RANK"] for command in ranks] == ["0", "1", "2", "3"]
    assert {command.env["WORLD_SIZE"] for command in ranks} == {"4"}
    assert {command.env["MASTER_PORT"] for command in ranks} == {ranks[0].env["MASTER_PORT"]}
    assert ranks[0].env["MVL_ATTEMPT"] == "3"
    assert int(ranks[0].env["OMP_NUM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 4)
    assert ranks[2].log == stage.attempt_path(3) / "rank_2.log"
    assert ranks[0].argv[1:4] == ["-m", "launch.cli", "train"]
    config = load_stage(LAPTOP / "stage0.yaml", ["train.threads=3"])
    assert rank_commands(RunFolder(tmp_path), stage, config, 1)[0].env["OMP_NUM_THREADS"] == "3"


def test_ends_are_described_in_words() -> None:
    assert describe_end(7) == "exited with status 7"
    assert "memory runs out" in describe_end(-9)
    assert describe_end(-11) == "was ended by SIGSEGV"


def test_an_interrupt_while_stopping_is_quick_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RankGroup(commands(tmp_path, STUBBORN), 60.0) as group:
        wait_for(tmp_path / "rank_0.log")

        def interrupted(seconds: float) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr("launch.local.time.sleep", interrupted)
        begun = time.monotonic()
        group.stop()
        assert time.monotonic() - begun < 30, "it waited out the grace period"
        assert not psutil.pid_exists(group.pids[0])
