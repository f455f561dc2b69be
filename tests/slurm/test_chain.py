"""A chain of jobs on a real Slurm: in order, once, whole, and repaired where it broke."""

import json
import re
from collections.abc import Callable

import pytest

from launch import exit_codes
from launch.cli import main
from launch.slurm import chain, queue
from launch.slurm.queue import SlurmError
from megatron_vl.run.folder import ParentError
from tests.slurm.chains import FakeChain

MakeChain = Callable[..., FakeChain]
pytestmark = pytest.mark.distributed


def test_a_chain_runs_in_order_and_is_not_run_twice(
    make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_chain()
    first = made.send()
    again = made.send()
    assert list(first.new) == ["init", "stage0"]
    assert (again.new, again.kept) == ({}, first.new)
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", [None])
    queue.point_at(first.new["init"], None)  # as when it starts between the look and the change
    events = [(e["event"], e["stage"]) for e in made.events() if e["event"] != "saved"]
    assert events == [
        ("planned", None),
        ("submitted", "init"),
        ("submitted", "stage0"),
        ("released", "init"),
        ("started", "init"),
        ("ended", "init"),
        ("started", "stage0"),
        ("ended", "stage0"),
    ]
    assert made.send().done == ["init", "stage0"]
    assert main(["status", str(made.run.path)]) == exit_codes.OK
    assert re.search(r"stage0 +done +1 +6/6", capsys.readouterr().out)
    assert main(["logs", str(made.run.path), "stage0", "--rank", "1"]) == exit_codes.OK
    assert "rank 1 of 2 at 127.0.0.11" in capsys.readouterr().out


def test_an_interrupted_submission_starts_nothing_and_the_next_completes_it(
    make_chain: MakeChain, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_chain()
    real = queue.submit_script
    taken: list[str] = []

    def dies_at_the_second(*args: object, **options: object) -> str:
        if taken:
            raise KeyboardInterrupt
        taken.append(real(*args, **options))  # type: ignore[arg-type]
        return taken[0]

    with monkeypatch.context() as patched:
        patched.setattr(queue, "submit_script", dies_at_the_second)
        with pytest.raises(KeyboardInterrupt):
            made.send()
    (head,) = made.jobs()
    assert (head.id, head.reason) == (taken[0], "JobHeldUser")
    assert made.events()[-1]["event"] == "submitted"
    sent = made.send()
    assert sent.kept == {"init": head.id}
    assert list(sent.new) == ["stage0"]
    made.wait_over()
    made.assert_as_undisturbed()


@pytest.mark.parametrize(
    ("site", "hint"),
    [
        ({"job": {"partition": "moon"}}, "job.partition of the site is moon; nearest valid: high"),
        ({"job": {"constraint": "h100"}}, "of the site is h100(.|\n)*leave the key out"),
        ({"job": {"memory": "9000G"}}, "--mem=9000G; there is 4 idle nodes"),
        ({"job": {"account": "others"}}, "yours is team(.|\n)*job.account of the site is others"),
        ({"time": {"limit_minutes": 300}}, "above 4 hours(.|\n)*limit_minutes of the site is 300"),
    ],
)
def test_what_slurm_would_refuse_is_refused_before_anything_is_queued(
    make_chain: MakeChain, site: dict, hint: str
) -> None:
    made = make_chain(site=site)
    with pytest.raises(SlurmError, match=hint):
        made.send()
    assert made.jobs() == []
    assert [event["event"] for event in made.events()] == ["planned"]


def test_a_job_starts_nothing_though_slurm_says_its_parent_ended_well(
    make_chain: MakeChain,
) -> None:
    """Slurm counts `afterok` of a job it has forgotten, or never knew, as satisfied."""
    made = make_chain(faults={"init": {"1": {"step": 2, "do": "nan"}}})
    made.send()
    made.wait_over()
    assert made.receipt("init").status == "held"
    queue.point_at(made.job("stage0").id, "1")
    made.wait("the end of stage0's job", lambda: not made.job("stage0").live)
    assert made.job("stage0").state == "FAILED"
    stage = made.run.stage("stage0")
    assert (stage.last_attempt(), stage.receipt()) == (0, None)
    gated = made.events()[-1]
    assert (gated["event"], gated["stage"], gated["decision"]) == ("gated", "stage0", "hold")
    assert "init done, but it is held" in gated["reason"]


@pytest.mark.slow
def test_a_script_submitted_by_hand_runs_what_is_due_and_nothing_else(
    make_chain: MakeChain,
) -> None:
    made = make_chain()
    with pytest.raises(ParentError, match="--from init"):
        made.send("stage0")
    made.send("init")
    made.wait_over()
    script = made.run.stage("init").path / chain.SCRIPT
    queue.command("sbatch", str(script))
    made.wait_over()
    assert made.job("init").state == "COMPLETED"
    assert made.run.stage("init").last_attempt() == 1
    made.send("stage0")
    queue.command("sbatch", str(made.run.stage("stage0").path / chain.SCRIPT))
    made.wait_over()
    assert [job.state for job in queue.jobs_by_stage(made.run)["stage0"]] == ["COMPLETED"] * 2
    made.assert_as_undisturbed()
    made.assert_causes("stage0", [None])


def test_status_and_logs_tell_what_the_queue_knows(
    make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_chain(faults={"init": {"1": {"step": 4, "do": "hang"}}})
    made.send()
    made.wait_step("init", 2)
    assert main(["status", str(made.run.path), "--json"]) == exit_codes.OK
    init, stage0 = json.loads(capsys.readouterr().out)["stages"]
    assert (init["status"], init["job"], init["attempt"]) == ("running", made.job("init").id, 1)
    assert init["eta_seconds"] > 0
    assert stage0["status"] == "queued"
    assert "waits for the stage before it" in stage0["reason"]
    assert main(["cancel", str(made.run.path)]) == exit_codes.OK
    assert "stopped" in capsys.readouterr().out
    assert made.receipt("init").status == "incomplete"
    made.assert_causes("init", ["stopped"])
    assert main(["status", str(made.run.path)]) == exit_codes.OK
    assert "to go on: mvl resume" in capsys.readouterr().out
    assert main(["cancel", str(made.run.path)]) == exit_codes.OK
    assert "nothing is running or waiting" in capsys.readouterr().out
