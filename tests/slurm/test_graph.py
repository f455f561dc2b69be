"""Branches, evaluations and gates as jobs of a real Slurm."""

from collections.abc import Callable
from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import main
from launch.gates import override
from tests.launch.node_recipe import stage, write_node_recipe
from tests.slurm.chains import FakeChain

MakeChain = Callable[..., FakeChain]
pytestmark = pytest.mark.distributed


def branching(gate: str) -> Callable[..., Path]:
    """init, stage0, an evaluation with a gate, and two branches behind it."""

    def write(folder: Path, steps: int) -> Path:
        return write_node_recipe(
            folder,
            gate,
            steps,
            other=stage("other", "after: check"),
            tip=stage("tip", "after: other"),
        )

    return write


def submitted(made: FakeChain) -> dict[str, str | None]:
    """What each stage's latest job waited for when it was queued."""
    return {e["stage"]: e["after"] for e in made.events() if e["event"] == "submitted"}


def test_a_gate_holds_both_branches_until_it_is_overridden(
    make_chain: MakeChain, capsys: pytest.CaptureFixture[str]
) -> None:
    # The weights of a fake rank are 64 characters long.
    made = make_chain(steps=2, write=branching("gate: {at_most: {name.length: 63}}\n"))
    sent = made.send()
    assert list(sent.new) == ["init", "stage0", "check", "other", "stage1", "tip"]
    after = submitted(made)
    assert after["stage1"] == after["other"] == sent.new["check"], "side by side"
    assert after["tip"] == sent.new["other"]
    made.wait("the verdict", lambda: made.run.stage("check").receipt() is not None)
    made.wait("the end of its job", lambda: not made.job("check").live)
    assert made.receipt("check").held_by_gate, made.story()
    assert made.receipt("check").metrics == {"name.length": 64}
    assert made.job("check").state == "FAILED"
    assert main(["status", str(made.run.path)]) == exit_codes.OK
    shown = capsys.readouterr().out
    assert "check: gate: name.length is 64, wanted at most 63" in shown
    assert "mvl gate override" in shown
    again = made.send()
    assert (again.new, again.kept) == ({}, {})
    assert again.held["other"] == "waits for check"
    waiting = {name: made.job(name).id for name in ("stage1", "other", "tip")}
    override(made.run, made.run.stage("check"), "64 it is", "ada")
    assert made.send().kept == waiting, "jobs that still wait are pointed anew"
    made.wait_over()
    for name in ("stage1", "other", "tip"):
        assert made.receipt(name).done, made.story()
    stage0 = made.receipt("stage0").checkpoint
    assert stage0 is not None
    for name in ("stage1", "other"):
        parent = made.receipt(name).parent
        assert parent is not None
        assert (parent.stage, parent.digest) == ("stage0", stage0.digest)
    assert made.run.stage("check").last_attempt() == 1


def test_a_branch_that_is_not_taken_starts_nothing(make_chain: MakeChain) -> None:
    gate = "gate: {at_most: {name.length: 63}, otherwise: branch, branch_to: other}\n"
    made = make_chain(steps=2, write=branching(gate))
    made.send()
    made.wait_over()
    assert {name: made.receipt_status(name) for name in ("stage1", "other", "tip")} == {
        "stage1": "", "other": "done", "tip": "done",
    }  # fmt: skip
    assert made.job("stage1").state == "COMPLETED"
    assert made.run.stage("stage1").last_attempt() == 0
    assert made.send().held == {"stage1": "not taken: the gate of check has gone on to other"}
