"""The supervisor: every stage on its parent's receipt, every end on record."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch import exit_codes
from launch.chain import Cancelled, Supervisor, _signals_raise
from launch.cli import main
from launch.graph import Selection
from launch.lock import BusyError, RunLock, holder
from launch.site import load_site
from launch.submission import prepare
from megatron_vl.config.errors import ConfigError
from megatron_vl.run.folder import ParentError, RunError, RunFolder
from tests.launch.small_recipe import FAILS, FINISHES, SILENT, SLEEPS, programs, write_recipe
from tests.launch.watchers import KeepingWatcher


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), folder, Selection(), "local")
    return folder


def supervise(run: RunFolder, **by_stage: Any) -> tuple[int, list[str]]:
    watcher = KeepingWatcher()
    supervisor = Supervisor(run, watcher, build_commands=programs(**by_stage), grace_seconds=2.0)
    return supervisor.run_selected(), watcher.said


def events(run: RunFolder) -> list[tuple[str, str | None]]:
    return [(event["event"], event["stage"]) for event in run.journal.read()]


def test_stages_run_in_order_each_from_its_parent(run: RunFolder) -> None:
    code, _ = supervise(run)
    assert code == exit_codes.OK
    first, second = (stage.receipt() for stage in run.stages())
    assert first is not None
    assert second is not None
    assert second.parent is not None
    assert first.checkpoint is not None
    assert second.parent.digest == first.checkpoint.digest
    assert events(run)[1:] == [
        ("started", "init"),
        ("ended", "init"),
        ("started", "stage0"),
        ("ended", "stage0"),
    ]
    assert (run.stage("init").attempt_path(1) / "config.yaml").exists()
    assert "finished init" in (run.stage("init").attempt_path(1) / "log").read_text()


def test_a_failed_stage_stops_the_chain_with_a_receipt_that_says_why(run: RunFolder) -> None:
    code, said = supervise(run, init=[SLEEPS, FAILS])
    assert code == exit_codes.FAILED
    receipt = run.stage("init").receipt()
    assert receipt is not None
    assert receipt.status == "failed"
    assert "rank 1 exited with status 7" in receipt.reason
    assert "the disk is on fire" in receipt.reason
    assert receipt.seconds.lost > 0
    assert run.stage("stage0").last_attempt() == 0
    assert "the disk is on fire" in said[-1]


def test_exit_status_zero_without_a_receipt_is_a_failure(run: RunFolder) -> None:
    code, _ = supervise(run, init=SILENT)
    receipt = run.stage("init").receipt()
    assert code == exit_codes.FAILED
    assert receipt is not None
    assert "wrote no receipt" in receipt.reason


def test_a_receipt_counts_more_than_an_exit_status(run: RunFolder) -> None:
    code, _ = supervise(run, init=FINISHES + "\nsys.exit(3)")
    assert code == exit_codes.OK


def test_a_second_submit_makes_a_new_attempt_and_keeps_the_first(run: RunFolder) -> None:
    supervise(run, init=FAILS)
    code, _ = supervise(run)
    assert code == exit_codes.OK
    stage = run.stage("init")
    receipt = stage.receipt()
    assert receipt is not None
    assert (receipt.status, receipt.attempts) == ("done", 2)
    assert (stage.attempt_path(1) / "receipt.json").exists()
    assert "fire" in (stage.attempt_path(1) / "log").read_text()


def test_done_stages_are_not_run_again(run: RunFolder) -> None:
    supervise(run, stage0=FAILS)
    _, said = supervise(run, init=FAILS)
    assert said[0] == "init: done before, at step 2; not run again"
    assert run.stage("init").last_attempt() == 1


def test_a_stage_does_not_start_from_a_changed_checkpoint(run: RunFolder) -> None:
    supervise(run, stage0=FAILS)
    (run.stage("init").checkpoints / "last" / "weights").write_text("other")
    with pytest.raises(ParentError, match="changed since"):
        supervise(run)
    assert run.stage("stage0").last_attempt() == 1
    assert events(run)[-1] == ("gated", "stage0")


def test_a_stage_does_not_start_without_its_parent(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), run, Selection(first="stage0"), "local")
    with pytest.raises(ParentError, match="init, which has no receipt"):
        supervise(run)
    assert run.stage("stage0").last_attempt() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_sigterm_stops_the_ranks_and_leaves_an_incomplete_receipt(
    run: RunFolder, number: signal.Signals
) -> None:
    def ask() -> None:
        """Send it once the rank has started; a rank that was waited for would leave `failed`."""
        for _ in range(1000):
            if ("started", "init") in events(run):
                break
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    asking = threading.Thread(target=ask)
    asking.start()
    with pytest.raises(Cancelled), _signals_raise():
        supervise(run, init=SLEEPS)
    asking.join()
    receipt = run.stage("init").receipt()
    assert receipt is not None
    assert receipt.status == "incomplete"
    assert [event for event, _ in events(run)][-2:] == ["signalled", "ended"]


def test_a_program_that_cannot_start_is_a_failure_not_a_cancel(run: RunFolder) -> None:
    def broken(*args: object) -> Any:
        commands = programs()(*args)  # type: ignore[arg-type]
        commands[0].argv[0] = "/no/such/python"
        return commands

    with pytest.raises(FileNotFoundError):
        Supervisor(run, KeepingWatcher(), build_commands=broken).run_selected()
    receipt = run.stage("init").receipt()
    assert receipt is not None
    assert receipt.status == "failed"
    assert "FileNotFoundError" in receipt.reason


def test_changing_a_done_stage_is_refused_and_says_what_differs(
    run: RunFolder, tmp_path: Path
) -> None:
    supervise(run, stage0=FAILS)
    recipe = tmp_path / "recipe"
    with pytest.raises(RunError, match=r"init .* is done .*train\.seed 1234 -> 5"):
        prepare(recipe, run, Selection(), "local", ["train.seed=5"])
    assert prepare(recipe, run, Selection(first="stage0"), "local", ["train.seed=5"]) == ["stage0"]
    assert supervise(run)[0] == exit_codes.OK


def test_a_run_keeps_its_stages(run: RunFolder, tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "other")
    (recipe / "stage0.yaml").unlink()
    with pytest.raises(RunError, match="with the stages init, stage0"):
        prepare(recipe, run, Selection(), "local")


def test_a_run_keeps_its_recipe_once_it_has_started(run: RunFolder, tmp_path: Path) -> None:
    twin = write_recipe(tmp_path / "twin")
    assert prepare(twin, run, Selection(), "local") == ["init", "stage0"]
    supervise(run, init=FAILS)
    with pytest.raises(RunError, match=r"was started from the recipe .*twin, not .*recipe"):
        prepare(tmp_path / "recipe", run, Selection(), "local")


def test_a_stage_file_selects_itself(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe")
    assert prepare(recipe / "init.yaml", run, Selection(), "local") == ["init"]
    assert [stage.name for stage in run.stages()] == ["init", "stage0"]


def test_a_skipped_stage_stays_out_until_it_is_selected(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    recipe = write_recipe(tmp_path / "recipe")
    prepare(recipe, run, Selection(skip=("stage0",)), "local")
    prepare(recipe, run, Selection(last="init"), "local")
    assert [stage.name for stage in run.stages()] == ["init"]
    prepare(recipe, run, Selection(), "local")
    assert [stage.name for stage in run.stages()] == ["init", "stage0"]


def test_one_supervisor_a_run(run: RunFolder) -> None:
    assert holder(run) is None
    lock = RunLock.take(run)
    found = holder(run)
    assert found is not None
    assert found[0] == os.getpid()
    with pytest.raises(BusyError, match=f"process {os.getpid()}"):
        RunLock.take(run)
    lock.release()
    assert holder(run) is None


def test_unknown_sites_and_launchers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the sites are"):
        load_site("moon")
    site = tmp_path / "site.yaml"
    site.write_text("launcher: pigeon\n")
    with pytest.raises(ConfigError, match=r"launcher is .pigeon., expected one of local, slurm"):
        load_site(str(site))


def test_cancel_stops_a_run_from_outside(run: RunFolder) -> None:
    program = (
        "import sys; from launch.chain import Supervisor, _signals_raise\n"
        "from launch.lock import RunLock; from megatron_vl.run.folder import RunFolder\n"
        "from tests.launch.small_recipe import SLEEPS, programs\n"
        "from tests.launch.watchers import KeepingWatcher\n"
        "run = RunFolder(sys.argv[1]); lock = RunLock.take(run)\n"
        "with _signals_raise():\n"
        "    Supervisor(run, KeepingWatcher(), build_commands=programs(init=SLEEPS)).run_selected()"
    )
    supervisor = subprocess.Popen(
        [sys.executable, "-c", program, str(run.path)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while "started" not in [event for event, _ in events(run)]:
        assert supervisor.poll() is None
        time.sleep(0.05)
    assert main(["cancel", str(run.path)]) == exit_codes.OK
    supervisor.wait(60)
    (ranks,) = [event["pids"] for event in run.journal.read() if event["event"] == "started"]
    assert not any(psutil.pid_exists(pid) for pid in ranks)
    receipt = run.stage("init").receipt()
    assert receipt is not None
    assert receipt.status == "incomplete"
    assert main(["cancel", str(run.path)]) == exit_codes.OK


def test_a_detached_supervisor_inherits_the_lock(run: RunFolder) -> None:
    lock = RunLock.take(run)
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.handle]
    )
    lock.release()
    assert holder(run) is not None
    child.kill()
    child.wait()
    assert holder(run) is None
