"""What ends an attempt, one at a time, on a real Slurm: nothing saved is trained twice, no stage
starts on a bad parent, and what completes is what an undisturbed chain gives."""

from collections.abc import Callable

import pytest

from launch.slurm import chain, queue
from tests.slurm.chains import FakeChain

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
        pytest.param("memory", "out_of_memory", "MemoryError", marks=pytest.mark.slow),
        pytest.param("disk", "disk_full", "No space left on device", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_succeed_is_held_and_not_tried_again(
    make_chain: MakeChain, what: str, cause: str, said: str
) -> None:
    made = make_chain(faults={"init": {"1": {"step": 3, "do": what}}})
    made.send()
    made.wait_over()
    made.assert_causes("init", [cause])
    receipt = made.receipt("init")
    assert receipt.status == "held"
    assert said in receipt.reason
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
def test_a_restarted_controller_changes_nothing(make_chain: MakeChain) -> None:
    made = make_chain(steps=20, pace=0.1)
    made.send()
    made.wait_step("init", 2)
    made.cluster.kill_controller()
    made.cluster.start_controller()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", [None])


@pytest.mark.slow
def test_a_changed_checkpoint_stops_the_chain(make_chain: MakeChain) -> None:
    made = make_chain()
    made.send("init")
    made.wait_over()
    checkpoint = made.run.stage("init").checkpoint_path(made.receipt("init"))
    weights = checkpoint / "weights"
    weights.write_text(weights.read_text()[:-1])
    made.send("stage0")
    made.wait_over()
    assert made.run.stage("stage0").last_attempt() == 0
    assert "its digest is" in made.events()[-1]["reason"]
    assert chain.live_job(queue.jobs_by_stage(made.run)["stage0"]) is None
