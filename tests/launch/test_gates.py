"""Gates: judged from receipts, held with a page, overridden on record, and branches they close."""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import exit_codes
from launch.chain import Supervisor
from launch.cli import main
from launch.gates import Check, judge, override, settle_gate
from launch.graph import Selection
from launch.local import CommandBuilder
from launch.report import render
from launch.submission import prepare
from megatron_vl.config.schema_gate import GateConfig
from megatron_vl.run.folder import ParentError, RunError, RunFolder, require_done_parent
from tests.launch.node_recipe import evaluation, quick_nodes, real_nodes, stage, write_node_recipe
from tests.launch.small_recipe import FAILS, FINISHES, programs
from tests.launch.watchers import KeepingWatcher

HOLDS = "gate: {at_most: {name.length: 3}}\n"  # the metric is 6 after stage0, 4 after init
PASSES = "gate: {at_most: {name.length: 6}}\n"
# A stage whose receipt holds metrics: FINISHES writes goodput 0.73.
LOW = "gate: {at_least: {goodput: 0.9}"
FINISHES_OTHERWISE = FINISHES.replace("write_text(stage.name)", "write_text('otherwise')")
Made = tuple[RunFolder, Callable[..., tuple[int, list[str]]]]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """Makes a run of the recipe with a gate, and what supervises it."""

    def made(skip: tuple[str, ...] = (), **recipe: str) -> Made:
        selection = Selection(skip=skip)
        run = RunFolder(tmp_path / "run")
        prepare(write_node_recipe(tmp_path / "recipe", **recipe), run, selection, "local")

        def supervise(commands: CommandBuilder | None = None) -> tuple[int, list[str]]:
            watcher = KeepingWatcher()
            supervisor = Supervisor(run, watcher, commands or quick_nodes(), grace_seconds=2.0)
            return supervisor.run_selected(), watcher.said

        return run, supervise

    return made


def verdict(run: RunFolder, name: str) -> dict[str, Any]:
    receipt = run.stage(name).receipt()
    assert receipt is not None
    return receipt.gate


def gated(run: RunFolder) -> list[tuple[str, str]]:
    return [(e["stage"], e["decision"]) for e in run.journal.read() if e["event"] == "gated"]


@pytest.mark.parametrize(
    ("rule", "bound", "value", "other", "passed"),
    [
        ("at_least", 55.0, 55.0, None, True),
        ("at_least", 55.0, 54.999, None, False),
        ("at_most", 2.0, 2.0, None, True),
        ("at_most", 2.0, 2.001, None, False),
        ("drop_at_most", 2.0, 63.6, 65.5, True),
        ("drop_at_most", 2.0, 63.4, 65.5, False),
        ("drop_at_most", 2.0, 80.0, 65.5, True),
        ("rise_at_most", 0.1, 1.05, 1.0, True),
        ("rise_at_most", 0.1, 1.2, 1.0, False),
        ("rise_at_most", 0.1, 0.2, 1.0, True),
        ("rise_at_most", 0.1, 0.2, None, False),
        *((rule, 1.0, math.nan, 1.0, False) for rule in ("at_least", "at_most", "drop_at_most")),
        *((rule, 1.0, None, 1.0, False) for rule in ("at_least", "at_most", "rise_at_most")),
    ],
)
def test_one_bound(
    rule: str, bound: float, value: float | None, other: float | None, passed: bool
) -> None:
    gate = GateConfig(**{rule: {"x.y": bound}}, reference="before")
    (check,) = judge(gate, {"x.y": value}, {"x.y": other})
    assert check.passed is passed
    assert f"{bound:g}" in check.words("before")


def test_a_bool_is_no_number() -> None:
    (check,) = judge(GateConfig(at_least={"x": 0.5}), {"x": True}, {})
    assert check == Check("x", "at_least", 0.5, None, None, False)


def test_an_evaluation_runs_and_passes_the_checkpoint_on(make: Callable[..., Made]) -> None:
    run, supervise = make(gate=PASSES)
    assert supervise(real_nodes())[0] == exit_codes.OK
    check, after, before = (run.stage(name).receipt() for name in ("check", "stage1", "stage0"))
    assert check is not None
    assert after is not None
    assert before is not None
    assert before.checkpoint is not None
    assert (check.kind, check.metrics, check.checkpoint) == ("evaluate", {"name.length": 6}, None)
    assert check.inputs == {"stage0": before.checkpoint.digest}
    assert list(check.outputs) == ["stages/02_check/metrics.json"]
    assert check.gate["decision"] == "continue"
    assert after.parent is not None
    assert after.parent.digest == before.checkpoint.digest
    assert gated(run) == [("check", "continue")]
    assert [event["event"] for event in run.journal.read() if event["stage"] == "check"] == [
        "started", "ended", "gated",
    ]  # fmt: skip
    assert supervise()[1][2] == "check: done before; not run again"


def test_a_gate_holds_with_a_page_and_goes_on_after_an_override(
    make: Callable[..., Made],
) -> None:
    run, supervise = make(gate=HOLDS)
    code, said = supervise()
    assert code == exit_codes.HELD
    assert "name.length is 6, wanted at most 3" in said[-1]
    check = run.stage("check")
    receipt = check.receipt()
    assert receipt is not None
    assert (receipt.status, receipt.gate["decision"]) == ("held", "hold")
    page = (check.attempt_path(1) / "gate.md").read_text()
    assert "| name.length | 6 | at most 3 | **does not hold** |" in page
    assert "mvl gate override" in page
    assert run.stage("stage1").last_attempt() == 0
    with pytest.raises(ParentError, match="waits for check, whose gate holds"):
        require_done_parent(run, run.stage("stage1"))
    assert supervise()[0] == exit_codes.HELD
    assert check.last_attempt() == 1, "nothing is measured again"
    override(run, check, "the suite is too small", "ada@host")
    assert supervise()[0] == exit_codes.OK
    assert verdict(run, "check")["override"]["who"] == "ada@host"
    (event,) = [event for event in run.journal.read() if event["event"] == "overridden"]
    assert (event["stage"], event["why"]) == ("check", "the suite is too small")
    assert gated(run) == [("check", "hold")]


def test_an_override_needs_a_held_gate_and_a_reason(make: Callable[..., Made]) -> None:
    run, supervise = make(gate=HOLDS)
    with pytest.raises(RunError, match=r"check has not ended yet.*no gate holds here"):
        override(run, run.stage("check"), "why not", "ada")
    supervise()
    with pytest.raises(RunError, match=r"stage0 is done.*held by their gates are check"):
        override(run, run.stage("stage0"), "why not", "ada")
    with pytest.raises(RunError, match="--reason is empty"):
        override(run, run.stage("check"), " ", "ada")


def test_other_bounds_make_a_new_verdict_and_train_nothing_again(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    run, supervise = make(gate=HOLDS)
    supervise()
    override(run, run.stage("check"), "for now", "ada")
    recipe = write_node_recipe(tmp_path / "recipe", gate="gate: {at_most: {name.length: 5}}\n")
    prepare(recipe, run, Selection(), "local")
    assert supervise()[0] == exit_codes.HELD, "an override is of the bounds it was given for"
    prepare(write_node_recipe(tmp_path / "recipe", gate=PASSES), run, Selection(), "local")
    assert supervise()[0] == exit_codes.OK
    assert run.stage("stage0").last_attempt() == run.stage("check").last_attempt() == 1
    assert gated(run) == [("check", "hold"), ("check", "hold"), ("check", "continue")]


def test_a_gate_nobody_came_to_judge_is_judged_before_the_next_stage(
    make: Callable[..., Made],
) -> None:
    run, _ = make(stage0=stage("stage0", LOW + "}"))
    watcher = KeepingWatcher()
    for name in ("init", "stage0"):
        Supervisor(run, watcher, programs()).run_stage(run.stage(name))
    receipt = run.stage("stage0").receipt()
    assert receipt is not None
    assert receipt.done
    with pytest.raises(ParentError, match=r"stage0, whose gate holds: gate: goodput is 0\.73"):
        Supervisor(run, watcher, quick_nodes()).run_stage(run.stage("check"))


def test_a_gate_compares_with_an_earlier_evaluation(make: Callable[..., Made]) -> None:
    run, supervise = make(
        gate="gate: {rise_at_most: {name.length: 1}, reference: first}\n",
        first=evaluation("first", "init"),
    )
    assert run.graph().parents["check"] == ("stage0", "first")
    assert supervise()[0] == exit_codes.HELD
    (found,) = verdict(run, "check")["checks"]
    assert (found["value"], found["compared"], found["passed"]) == (6.0, 4.0, False)


def test_a_skipped_stage_shows_in_the_gate_behind_it(make: Callable[..., Made]) -> None:
    run, supervise = make(("stage0",), gate="gate: {at_least: {name.length: 6}}\n")
    assert supervise()[0] == exit_codes.HELD
    receipt = run.stage("check").receipt()
    assert receipt is not None
    assert list(receipt.inputs) == ["init"]
    assert receipt.metrics == {"name.length": 4}


@pytest.mark.parametrize(
    ("bound", "runs", "leaves"), [(0.5, "stage1", "more"), (0.9, "more", "stage1")]
)
def test_a_gate_branches(make: Callable[..., Made], bound: float, runs: str, leaves: str) -> None:
    run, supervise = make(
        stage0=stage(
            "stage0",
            f"gate: {{at_least: {{goodput: {bound}}}, otherwise: branch, branch_to: more}}",
        ),
        check="",
        stage1=stage("stage1", "after: stage0"),
        more=stage("more", "after: stage0"),
        later=stage("later", "after: more"),
    )
    code, said = supervise()
    assert code == exit_codes.OK
    assert run.stage(runs).receipt() is not None
    assert run.stage(leaves).last_attempt() == 0
    assert f"{leaves}: not taken: the gate of stage0 has gone on to {runs}" in said
    assert (run.stage("later").receipt() is not None) is (runs == "more")
    with pytest.raises(ParentError, match="not taken"):
        require_done_parent(run, run.stage(leaves))


def test_a_gate_that_only_records_holds_nothing(make: Callable[..., Made]) -> None:
    run, supervise = make(gate="gate: {at_most: {name.length: 3}, otherwise: continue}\n")
    assert supervise()[0] == exit_codes.OK
    assert verdict(run, "check")["passed"] is False


def test_branches_of_one_parent_all_run_though_one_fails(make: Callable[..., Made]) -> None:
    run, supervise = make(
        check="",
        stage1=stage("stage1", "after: stage0"),
        other=stage("other", "after: stage0"),
        tip=stage("tip", "after: other"),
    )
    code, _ = supervise(programs(other=FAILS))
    assert code == exit_codes.FAILED
    done = {s.name: r.status for s in run.stages() if (r := s.receipt()) is not None}
    assert done == {"init": "done", "stage0": "done", "other": "failed", "stage1": "done"}


def test_a_node_runs_again_for_another_checkpoint_and_not_for_the_same(
    make: Callable[..., Made],
) -> None:
    run, supervise = make(gate=PASSES, stage1="")
    supervise()
    stage0 = run.stage("stage0")
    receipt = stage0.receipt()
    assert receipt is not None
    assert receipt.checkpoint is not None
    stage0.receipt_path.unlink()
    supervise(quick_nodes(stage0=FINISHES_OTHERWISE))
    check = run.stage("check").receipt()
    assert check is not None
    assert check.attempts == 2
    assert check.inputs["stage0"] != receipt.checkpoint.digest
    assert check.metrics == {"name.length": 9}
    supervise()
    assert run.stage("check").last_attempt() == 2


def test_a_command_that_fails_or_writes_no_numbers_fails_its_node(
    make: Callable[..., Made], tmp_path: Path
) -> None:
    run, supervise = make(gate=PASSES)
    (tmp_path / "recipe" / "measure.py").write_text("raise SystemExit('the judge is away')")
    code, said = supervise(real_nodes())
    assert code == exit_codes.FAILED
    assert "rank 0 exited with status 3: `mvl evaluate" in said[-1]
    assert "the judge is away" in said[-1]
    (tmp_path / "recipe" / "measure.py").write_text(
        "import json, sys; json.dump({'a': 'b'}, open(sys.argv[2], 'w'))"
    )
    assert supervise(real_nodes())[0] == exit_codes.FAILED
    assert run.stage("check").last_attempt() == 2


def test_settling_twice_says_nothing_new(make: Callable[..., Made]) -> None:
    run, supervise = make(gate=HOLDS)
    supervise()
    before = run.stage("check").receipt_path.read_text()
    settle_gate(run, run.stage("check"))
    assert run.stage("check").receipt_path.read_text() == before
    assert json.loads(before)["gate"]["ended"] == "measured 1 metrics of stage0"
    assert len(gated(run)) == 1


def test_status_and_the_report_tell_of_the_gate(
    make: Callable[..., Made], capsys: pytest.CaptureFixture[str]
) -> None:
    run, supervise = make(gate=HOLDS)
    supervise()
    assert main(["status", str(run.path)]) == exit_codes.OK
    shown = capsys.readouterr().out
    assert "run: held" in shown
    assert re.search(r"check +held +1 +evaluate .*holds", shown)
    assert "stage1: waits for check, which a gate holds" in shown
    assert f"mvl gate override {run.path} check --reason WHY" in shown
    assert main(["status", str(run.path), "--json", "--watch", "0.1"]) == exit_codes.OK
    stages = {one["stage"]: one for one in json.loads(capsys.readouterr().out)["stages"]}
    assert (stages["check"]["gate"], stages["check"]["kind"]) == ("holds", "evaluate")
    assert stages["stage1"]["after"] == ["check"]
    override(run, run.stage("check"), "<b>small</b>", "ada")
    page = render(run)
    assert "at most 3" in page
    assert "overridden by ada" in page
    assert "&lt;b&gt;small&lt;/b&gt;" in page


def test_the_command_records_who_and_why_and_goes_on(
    make: Callable[..., Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, supervise = make(gate=HOLDS)
    supervise()
    monkeypatch.setattr("launch.submit.resume", lambda args: supervise()[0])
    words = ["gate", "override", str(run.path), "check", "--reason", "it's $(fine)"]
    assert main(words) == exit_codes.OK
    record = verdict(run, "check")["override"]
    assert record["why"] == "it's $(fine)"
    assert "@" in record["who"]
    assert run.stage("stage1").last_attempt() == 1
    assert main(words) == exit_codes.USAGE, "nothing holds any more"
