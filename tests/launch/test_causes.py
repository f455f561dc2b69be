"""Classes of endings, budgets of starts, and the page a person finds."""

import itertools
from pathlib import Path

import pytest

from launch.causes import RETRIED, Cause, Evidence, advice, classify
from launch.post_mortem import Findings, write_post_mortem
from launch.site_schema import RequeueSection
from launch.slurm.budget import Decision, Ending, decide, endings
from launch.slurm.evidence import step_result
from megatron_vl.run.folder import RunFolder

GONE = "RuntimeError: [pair.cc] Connection closed by peer [10.0.0.1]:4711"


@pytest.mark.parametrize(
    ("evidence", "cause"),
    [
        (Evidence(slurm="*** JOB 7 ON n1 CANCELLED AT x DUE TO PREEMPTION ***"), "preempted"),
        (Evidence(slurm="PreemptTime=2026-01-01T00:00:00", said=GONE), "preempted"),
        (Evidence(slurm="PreemptTime=None", said="RuntimeError: x"), "crashed"),
        (Evidence(slurm="*** JOB 7 CANCELLED DUE TO NODE FAILURE, SEE", said=GONE), "node_lost"),
        (Evidence(slurm="*** JOB 7 CANCELLED DUE TO TIME LIMIT ***"), "time_limit"),
        (Evidence(slurm="slurmstepd: error: Detected 1 oom_kill event"), "out_of_memory"),
        (Evidence(said="torch.OutOfMemoryError: CUDA out of memory."), "out_of_memory"),
        (Evidence(said="RuntimeError: DefaultCPUAllocator: can't allocate"), "out_of_memory"),
        (Evidence(said="OSError: [Errno 28] No space left on device"), "disk_full"),
        (Evidence(said="WriteError: rank 1: [Errno 27] File too large"), "disk_full"),
        (Evidence(said="NonFiniteLossError: the loss is nan"), "not_finite"),
        (Evidence(said="CheckpointError: step_7 does not fit"), "bad_checkpoint"),
        (Evidence(said="ValueError: empty (megatron_vl/data/blend.py:9)"), "bad_data"),
        (Evidence(said="ValueError: tensor 3 (megatron_vl/engine/x.py:9)"), "bad_config"),
        (Evidence(said="KeyError: 'x' (megatron_vl/engine/x.py:9)"), "crashed"),
        (Evidence(said=GONE, printed="ValueError: some warning"), "node_lost"),
        (Evidence(said=GONE, printed="MemoryError"), "out_of_memory"),
        (Evidence(killed=True), "out_of_memory"),
        (Evidence(killed=True, cancelled=True), "stopped"),
        (Evidence(said="certificate failed: kl of fp8\nfp8: MemoryError"), "certificate_failed"),
        (Evidence(said="`mvl checkpoint release` exited with status 2: no file"), "bad_config"),
        (Evidence(said="`mvl checkpoint release` exited with status 1: KeyError"), "crashed"),
        (Evidence(said=GONE), "node_lost"),
        (Evidence(), "crashed"),
    ],
)
def test_every_ending_has_a_class(evidence: Evidence, cause: str) -> None:
    assert classify(evidence) is Cause(cause)


def test_every_class_has_advice() -> None:
    assert all(advice(cause).endswith(".") for cause in Cause)


def test_what_srun_prints_is_read_by_rank() -> None:
    text = (
        "srun: error: n2: task 5: Segmentation fault (core dumped)\n"
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
        "slurmstepd-n1: error: *** STEP 7.0 ON n1 CANCELLED AT 2026 ***\n"
        "srun: error: n1: tasks 0-2,4: Exited with exit code 1\n"
        "srun: error: n1: task 3: Killed\n"
    )
    result = step_result(text, 7)
    assert result.first_failed == 5
    assert result.codes == [1, 1, 1, -9, 1, -11, 0]
    assert step_result("", 2).first_failed is None


def again(cause: Cause, *, progressed: bool, earlier: list[Ending], **budgets: int) -> Decision:
    return decide(Ending(cause, progressed), earlier, RequeueSection(**budgets))


@pytest.mark.parametrize("cause", Cause)
def test_only_what_can_succeed_is_tried_again(cause: Cause) -> None:
    assert again(cause, progressed=True, earlier=[]).again == (cause in RETRIED)


@pytest.mark.parametrize("cause", RETRIED)
def test_a_budget_ends(cause: Cause) -> None:
    used = [Ending(cause, True)] * 2
    others = [Ending(other, True) for other in RETRIED if other is not cause]
    budget = {cause.value: 3}
    assert again(cause, progressed=True, earlier=used + others, **budget).again
    ended = again(cause, progressed=True, earlier=[*used, used[0]], **budget)
    assert not ended.again
    assert f"requeue.{cause.value} allows 3 starts" in ended.reason


def test_no_progress_ends_sooner_where_the_stage_itself_is_why() -> None:
    allowed = {Cause.time_limit: 0, Cause.crashed: 1, Cause.preempted: 3, Cause.node_lost: 3}
    for cause, most in allowed.items():
        for count in range(5):
            earlier = [Ending(cause, True), *[Ending(cause, False)] * count]
            found = again(cause, progressed=False, earlier=earlier)
            assert found.again == (count + 1 <= most), (cause, count)
            assert again(cause, progressed=True, earlier=earlier, crashed=20).again


def test_a_site_can_forbid_it() -> None:
    budgets = RequeueSection(enabled=False)
    found = decide(Ending(Cause.preempted, True), [], budgets)
    assert (found.again, found.reason) == (False, "requeue.enabled is false on this site")


def test_budgets_count_from_the_last_submission() -> None:
    def event(name: str, stage: str = "init", **more: object) -> dict:
        return {"event": name, "stage": stage, **more}

    crash = event("ended", cause="crashed", progressed=False)
    events = [
        event("submitted"),
        crash,
        event("submitted"),
        crash,
        event("ended", "stage0", cause="node_lost", progressed=True),
        event("ended", cause=None, progressed=True),
    ]
    assert endings(events, "init") == [Ending(Cause.crashed, False)]
    assert endings(events, "stage0") == [Ending(Cause.node_lost, True)]
    assert endings([*events, event("submitted")], "init") == []


def test_the_page_says_what_why_and_what_to_try(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "my run")
    run.create({"stages": [{"name": "init", "folder": "00_init"}]})
    stage = run.stage("init")
    log = stage.attempt_path(stage.start_attempt()) / "rank_0.log"
    log.write_text("\n".join(itertools.chain(map(str, range(99)), ["~~~~~~", "the end"])))
    found = Findings(
        Cause.not_finite, "rank 0 said nan", "never again", log, ["srun: error"], {"job": "7"}
    )
    page = write_post_mortem(run, stage, 1, found).read_text()
    for wanted in (
        "# init, attempt 1: not_finite", "rank 0 said nan", "Held: never again.", "- job: 7",
        advice(Cause.not_finite), f"`mvl resume '{run.path}' --from init`", "srun: error",
        "the end", "98",
    ):  # fmt: skip
        assert wanted in page
    assert "\n70\n" not in page
    assert page.count("\n~~~~~~\n") == 4
