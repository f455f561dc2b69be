"""What ends an attempt, one at a time, on a real Slurm: nothing saved is trained twice, no stage
starts on a bad parent, and what completes is what an undisturbed chain gives."""

import os
import pty
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from launch.slurm import chain, queue
from tests.conftest import REPOSITORY
from tests.slurm.chains import FAKE_RANK, FakeChain

MakeChain = Callable[..., FakeChain]
HANGS = {"init": {"1": {"step": 4, "do": "hang"}}}
"""The first attempt saves step 2, then waits for what the test does to it."""
pytestmark = pytest.mark.distributed


def test_the_warning_saves_and_starts_again(make_chain: MakeChain) -> None:
    made = make_chain(faults=HANGS)
    made.send()
    made.wait_step("init", 2)
    queue.command("scancel", "--batch", "--signal=USR1", made.job("init").id)
    made.wait("the second attempt", lambda: made.run.stage("init").last_attempt() == 2)
    assert made.job("init").id == made.events()[1]["job"]
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["time_limit", None])
    assert made.receipt("init").attempts == 2


def test_preemption_saves_and_starts_again(make_chain: MakeChain) -> None:
    made = make_chain(faults=HANGS)
    made.send()
    made.wait_step("init", 2)
    other = queue.command(
        "sbatch", "--parsable", "--partition=high", "--nodes=4", "--exclusive", "--time=1",
        "--output=/dev/null", "--wrap", "sleep 1",
    )  # fmt: skip
    made.wait("the second attempt", lambda: made.run.stage("init").last_attempt() == 2)
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["preempted", None])
    assert queue.find_jobs(["wrap"])[-1].id == other


def test_a_lost_node_starts_again_from_the_last_save(make_chain: MakeChain) -> None:
    made = make_chain(faults=HANGS)
    made.send()
    made.wait_step("init", 2)
    node = queue.command("squeue", "-h", "-j", made.job("init").id, "-o", "%N")
    made.cluster.kill_node(node)
    try:
        made.wait("the second attempt", lambda: made.run.stage("init").last_attempt() == 2)
    finally:
        made.cluster.revive_node(node)
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["node_lost", None])


def test_scancel_is_a_person_s_word_and_resume_goes_on(make_chain: MakeChain) -> None:
    made = make_chain(faults=HANGS)
    made.send()
    made.wait_step("init", 2)
    queue.cancel([made.job("init").id])
    made.wait_over()
    assert made.run.stage("init").last_attempt() == 1
    assert made.run.stage("stage0").last_attempt() == 0
    waiting = made.job("stage0").id
    sent = made.send()
    assert (list(sent.new), sent.kept) == (["init"], {"stage0": waiting})
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["stopped", None])


@pytest.mark.slow
def test_a_crash_is_tried_once_more(make_chain: MakeChain) -> None:
    made = make_chain(faults={"stage0": {"1": {"step": 4, "do": "crash"}}})
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("stage0", ["crashed", None])


def test_a_crash_without_progress_is_held_with_a_page(make_chain: MakeChain) -> None:
    crash = {"step": 1, "do": "crash"}
    made = make_chain(faults={"init": {"1": crash, "2": crash, "3": crash}})
    made.send()
    made.wait_over()
    made.assert_causes("init", ["crashed", "crashed"])
    receipt = made.receipt("init")
    assert receipt.status == "held"
    assert "2 attempts in a row ended without a new checkpoint" in receipt.reason
    page = (made.run.stage("init").attempt_path(2) / "post_mortem.md").read_text()
    assert "# init, attempt 2: crashed" in page
    assert "RuntimeError: the rank is broken" in page
    assert "mvl resume" in page
    assert made.run.stage("stage0").last_attempt() == 0


@pytest.mark.parametrize(
    ("what", "cause", "said"),
    [
        ("nan", "not_finite", "NonFiniteLossError: the loss is nan"),
        ("kill", "out_of_memory", "was ended by SIGKILL"),
        ("memory", "out_of_memory", "MemoryError"),
        ("oom", "out_of_memory", "Detected 1 oom_kill event"),
    ],
)
def test_what_cannot_succeed_is_held_and_not_tried_again(
    make_chain: MakeChain, what: str, cause: str, said: str
) -> None:
    made = make_chain(faults={"init": {"1": {"step": 3, "do": what}}})
    made.send()
    made.wait_over()
    made.assert_causes("init", [cause])
    assert made.receipt("init").status == "held"
    page = (made.run.stage("init").attempt_path(1) / "post_mortem.md").read_text()
    assert said in page
    assert made.run.stage("stage0").last_attempt() == 0
    made.assert_nothing_saved_was_trained_twice("init")


@pytest.mark.slow
def test_a_held_stage_goes_on_when_a_person_says_so(make_chain: MakeChain) -> None:
    made = make_chain(faults={"init": {"1": {"step": 3, "do": "nan"}}})
    made.send()
    made.wait_over()
    sent = made.send()
    assert list(sent.new) == ["init"]
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["not_finite", None])


@pytest.mark.slow
def test_a_controller_that_crashes_and_comes_back_loses_nothing(make_chain: MakeChain) -> None:
    """Slurm writes its state down every five seconds; what it was told since is gone."""
    made = make_chain(steps=40, pace=0.25)
    made.send()
    made.wait_step("init", 2)
    time.sleep(7)
    made.cluster.kill_controller()
    made.cluster.start_controller()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", [None])


def test_what_was_changed_by_hand_starts_nothing_and_is_named(make_chain: MakeChain) -> None:
    """A checkpoint cut short, a receipt edited, a receipt cut short; repaired, the chain goes on.

    The job is let go by `afterok` each time: what it reads on disk is what stops it.
    """
    made = make_chain()
    made.send("init")
    made.wait_over()
    stage = made.run.stage("init")
    weights = stage.checkpoint_path(made.receipt("init")) / "weights"
    receipt = stage.receipt_path
    digest = made.receipt("init").checkpoint
    assert digest is not None
    edits: list[tuple[Path, Callable[[str], str], str]] = [
        (weights, lambda text: text[:-1], f"the receipt of init says {digest.digest[:12]}..."),
        (receipt, lambda text: text.replace('"step": 6', '"step": 5'), "has been edited"),
        (receipt, lambda text: text[:200], "not JSON"),
    ]
    script = made.run.stage("stage0").path / chain.SCRIPT
    for path, edit, said in edits:
        good = path.read_text()
        path.write_text(edit(good))
        if script.exists():
            queue.submit_script(script, after=made.job("init").id, hold=False)
        else:
            made.send("stage0")
        made.wait("its end", lambda: not made.job("stage0").live)
        path.write_text(good)
        assert made.job("stage0").state == "FAILED"
        gated = made.events()[-1]
        assert (gated["event"], gated["decision"]) == ("gated", "hold"), made.story()
        assert said in gated["reason"]
    assert made.run.stage("stage0").last_attempt() == 0
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()


def test_a_full_disk_in_a_save_is_held_and_with_room_it_goes_on(make_chain: MakeChain) -> None:
    made = make_chain(faults={"init": {"1": {"step": 3, "do": "disk", "rank": 0}}})
    made.send()
    made.wait_over()
    made.assert_causes("init", ["disk_full"])
    assert "No space left on device" in made.receipt("init").reason
    assert "Make room" in (made.run.stage("init").attempt_path(1) / "post_mortem.md").read_text()
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["disk_full", None])


def test_the_shell_that_submitted_may_go_away(make_chain: MakeChain) -> None:
    """`submit --follow` in a terminal that closes: the jobs are Slurm's, not the terminal's."""
    made = make_chain(faults=HANGS)
    words = f"""
from launch.slurm import chain, watch
from megatron_vl.run.folder import RunFolder
run = RunFolder({str(made.run.path)!r})
words = lambda stage: [{str(FAKE_RANK)!r}, {str(made.run.path.resolve())!r}, stage.name, "0.05"]
chain.take_snapshot = lambda run: __import__('pathlib').Path({str(REPOSITORY)!r})
chain.send(run, ["init", "stage0"], words)
watch.follow(run, ["init", "stage0"])
"""
    child, terminal = pty.fork()
    if child == 0:
        os.chdir(REPOSITORY)
        os.execv(sys.executable, [sys.executable, "-c", words])
    made.wait_step("init", 2)
    os.close(terminal)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGHUP
    queue.command("scancel", "--batch", "--signal=USR1", made.job("init").id)
    made.wait_over()
    made.assert_as_undisturbed()


@pytest.mark.slow
def test_ranks_that_hang_are_ended_before_the_limit_and_start_again(
    make_chain: MakeChain,
) -> None:
    """Slurm's shortest limit is a minute, and it warns up to a minute early."""
    site = {"time": {"limit_minutes": 1, "lead_seconds": 30, "save_seconds": 1, "start_seconds": 1}}
    made = make_chain(faults={"init": {"1": {"step": 4, "do": "deaf"}}}, site=site)
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["time_limit", None])
    first = made.run.stage("init").attempt_path(1) / "receipt.json"
    assert "they hang" in first.read_text()


@pytest.mark.slow
def test_a_job_that_slurm_ends_at_its_limit_without_a_word_goes_on_by_resume(
    make_chain: MakeChain,
) -> None:
    made = make_chain(faults={"init": {"1": {"step": 4, "do": "deaf"}}})
    made.send()
    made.wait_step("init", 2)
    queue.command("scontrol", "update", f"jobid={made.job('init').id}", "EndTime=now+1")
    made.wait_over()
    assert made.job("init").state == "TIMEOUT"
    assert made.run.stage("stage0").last_attempt() == 0
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["time_limit", None])
