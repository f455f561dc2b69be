"""`mvl status`: how the runs of a folder, or the stages of one run, stand.

Reads plans, receipts and metrics, and of a run on a cluster the queue; imports neither torch nor
the config loader, and answers in under half a second on a login node.
"""

import json
import shlex
import sys
import time
from argparse import Namespace
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from launch import exit_codes
from launch.lock import holder
from launch.nodes.errors import CERTIFICATE_FAILED
from launch.tables import STATUS_STYLES, print_table
from launch.way_on import resume, submit_again
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.metrics import eval_lines, read_metrics, step_lines

if TYPE_CHECKING:
    from launch.slurm.watch import JobView
    from megatron_vl.run.receipt import Receipt

_RECENT_STEPS = 20


@dataclass(frozen=True)
class StageStatus:
    """How one stage stands, from the files alone."""

    stage: str
    status: str
    """A receipt's status, or waiting, queued (its job waits), running, lost (started, no receipt,
    nobody runs it), not taken (a gate went another way), unknown (on a cluster whose queue cannot
    be asked here)."""
    attempt: int
    step: int
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_s: float | None
    mfu: float | None
    """Model FLOP utilisation of the last step; None where the stage declares no peak."""
    age_seconds: float | None
    """Since the receipt, or since the last measurement of a running stage."""
    eta_seconds: float | None
    """Until the last step of a running stage, from its latest steps."""
    reason: str
    """Why it ended so, or why it waits."""
    job: str | None = None
    """Its latest job on a cluster."""
    kind: str = "train"
    """`train`, or what the node does."""
    after: tuple[str, ...] = ()
    """What it waits for."""
    gate: str = ""
    """Its gate's verdict: passed, holds, overridden, branched, or failed where it only records."""


def run_status(run: RunFolder) -> list[StageStatus]:
    """The stages of a run in order; skipped ones are left out. Raises RunError, ReceiptError."""
    plan = run.plan()
    totals = {entry["name"]: entry["steps"] for entry in plan["stages"]}
    stages = run.stages()
    if plan.get("launcher") == "slurm":
        from launch.slurm.watch import views

        seen = views(run)
        found = [
            _stage_status(stage, totals[stage.name], *_on_cluster(run, stage, seen))
            for stage in stages
        ]
    else:
        word = "running" if holder(run) is not None else "lost"
        found = [_stage_status(stage, totals[stage.name], word) for stage in stages]
    return _in_graph(run, found)


def _in_graph(run: RunFolder, found: list[StageStatus]) -> list[StageStatus]:
    """The same with what only the graph tells: what a stage waits for, and ways not taken."""
    graph = run.graph()
    kinds = {entry["name"]: entry.get("kind", "train") for entry in run.plan()["stages"]}
    held: set[str] = set()
    closed: dict[str, str] = {}
    placed = []
    for stage in found:
        parents = graph.parents[stage.stage]
        held |= {stage.stage} if stage.gate == "holds" else set()
        shut = next((closed[p] for p in parents if p in closed), _closed_by(run, stage.stage))
        if shut and stage.status in ("waiting", "queued", "lost"):
            closed[stage.stage] = shut
            stage = replace(stage, status="not taken", reason=shut)
        behind = [parent for parent in parents if parent in held]
        if behind and stage.status in ("waiting", "queued"):
            held.add(stage.stage)
            stage = replace(stage, reason=f"waits for {', '.join(behind)}, which a gate holds")
        placed.append(replace(stage, kind=kinds[stage.stage], after=parents))
    return placed


def _closed_by(run: RunFolder, name: str) -> str:
    """The verdict right before a stage that has closed the way to it; empty without one."""
    for parent in run.graph().parents[name]:
        receipt = run.stage(parent).receipt()
        if receipt is not None and name in receipt.gate.get("closed", []):
            return f"the gate of {parent} has gone on to {', '.join(receipt.gate['open'])}"
    return ""


def _on_cluster(
    run: RunFolder, stage: StageFolder, seen: "dict[str, JobView] | None"
) -> "tuple[str, JobView | None]":
    """What an attempt without a receipt is, and what Slurm says of the stage's job."""
    if seen is None:
        return "unknown", None
    view = seen.get(stage.name)
    if view is None or not view.live:
        gated = [e for e in run.journal.read() if e["stage"] == stage.name]
        if gated and gated[-1]["event"] == "gated" and view is not None:
            view = replace(view, note=f"{view.note}: {gated[-1]['reason']}")
        return "lost", view
    return ("running" if view.running else "queued"), view


def overall(stages: list[StageStatus]) -> str:
    """One word for a run: that of the first stage that is not done.

    `partial` when some stages are done and nothing has gone wrong: nobody has asked for the others,
    or a supervisor is about to start the next.
    """
    ended = ("done", "not taken")
    word = next((stage.status for stage in stages if stage.status not in ended), "done")
    return "partial" if word == "waiting" and stages[0].status == "done" else word


def main(args: Namespace) -> int:
    """Print the table of one run, or of all runs of a folder; with --watch again and again."""
    if args.watch is None:
        return _show(args)
    if args.watch <= 0:
        raise RunError(f"--watch {args.watch:g}: seconds between two looks, must be above 0")
    while True:
        if sys.stdout.isatty():
            print("\033[H\033[2J", end="")
        code = _show(args)
        sys.stdout.flush()
        if not _goes_on(RunFolder(args.run)):
            return code
        time.sleep(args.watch)


def _goes_on(run: RunFolder) -> bool:
    """Whether there will be news: a run under way, or a folder of runs, which is always watched."""
    if not run.exists():
        return True
    return any(stage.status in ("running", "queued") for stage in run_status(run)) or (
        holder(run) is not None
    )


def _show(args: Namespace) -> int:
    folder = Path(args.run)
    run = RunFolder(folder)
    if run.exists():
        stages = run_status(run)
        if args.json:
            print(json.dumps({"run": run.name, "stages": [asdict(stage) for stage in stages]}))
        else:
            _print_run(run, stages)
        return exit_codes.OK
    runs = [RunFolder(path.parent) for path in sorted(folder.glob("*/plan.yaml"))]
    if not runs:
        what = "no run here, and no folder of runs" if folder.is_dir() else "no such folder"
        raise RunError(f"{folder}: {what}; mvl submit STAGES --run {folder / 'NAME'} makes one")
    found = {run: run_status(run) for run in runs}
    if args.json:
        print(
            json.dumps(
                [
                    {
                        "run": run.name,
                        "status": overall(stages),
                        "stages": list(map(asdict, stages)),
                    }
                    for run, stages in found.items()
                ]
            )
        )
    else:
        _print_runs(found)
    return exit_codes.OK


def _stage_status(
    stage: StageFolder, steps: int, word: str, view: "JobView | None" = None
) -> StageStatus:
    """How a stage stands; `word` is what an attempt without a receipt is."""
    receipt, attempt = stage.receipt(), stage.last_attempt()
    records = read_metrics(stage.metrics_path)
    trained, evaluated = step_lines(records), eval_lines(records)
    last = trained[-1] if trained else {}
    status: str
    age: float | None
    live = view is not None and view.live
    if receipt is not None and (receipt.done or not live):
        status, step, reason = receipt.status, receipt.step, receipt.reason
        age = time.time() - datetime.fromisoformat(receipt.ended).timestamp()
    else:
        status = word if attempt or live or word == "unknown" else "waiting"
        step, reason = last.get("step", 0), view.note if view else ""
        age = time.time() - stage.metrics_path.stat().st_mtime if last else None
    eta = None
    if status == "running" and last:
        recent = [line["seconds"] for line in trained[-_RECENT_STEPS:]]
        eta = round((steps - last["step"]) * sum(recent) / len(recent), 1)
    return StageStatus(
        stage=stage.name,
        status=status,
        attempt=attempt,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        eval_loss=evaluated[-1]["loss"] if evaluated else None,
        tokens_per_s=last.get("tokens_per_s"),
        mfu=last.get("mfu"),
        age_seconds=None if age is None else round(max(0.0, age), 1),
        eta_seconds=eta,
        reason=reason,
        job=view.job if view else None,
        gate=gate_word(receipt),
    )


def gate_word(receipt: "Receipt | None") -> str:
    """The verdict of a gate in a word."""
    gate = receipt.gate if receipt is not None else {}
    if not gate:
        return ""
    if "override" in gate:
        return "overridden"
    words = {"hold": "holds", "branch": "branched", "continue": "failed"}
    return "passed" if gate["passed"] else words[gate["decision"]]


def _print_run(run: RunFolder, stages: list[StageStatus]) -> None:
    names = ["stage", "status", "attempt", "step", "loss", "held-out", "tokens/s", "MFU", "age"]
    rows = [
        [
            stage.stage,
            stage.status,
            str(stage.attempt or ""),
            f"{stage.step}/{stage.steps}" if stage.steps else stage.kind,
            _number(stage.loss, ".4f"),
            _number(stage.eval_loss, ".4f"),
            _number(stage.tokens_per_s, ",.0f"),
            _number(stage.mfu, ".1%"),
            _age(stage.age_seconds),
            _age(stage.eta_seconds),
            stage.gate,
        ]
        for stage in stages
    ]
    names += ["left", "gate"]
    for column in (10, 7):  # columns that say nothing about this run
        if not any(row[column] for row in rows):
            names.pop(column)
            rows = [row[:column] + row[column + 1 :] for row in rows]
    print_table(f"{run.path}: {overall(stages)}", names, rows, left=2, styles=STATUS_STYLES)
    for stage in stages:
        if stage.status not in ("done", "lost") and stage.reason:
            print(f"{stage.stage}: {stage.reason}")
        if stage.status == "lost":
            gone = "nothing runs it any more"
            print(f"{stage.stage}: {stage.reason or gone}")
    words = {stage.status for stage in stages}
    _print_left_out(run)
    for stage in stages:
        if stage.gate == "holds":
            asked = ["mvl", "gate", "override", str(run.path), stage.stage, "--reason", "WHY"]
            print(f"to go on behind the gate of {stage.stage}, on record: {shlex.join(asked)}")
    if "unknown" in words:
        print("Slurm cannot be asked here; what its queue holds is not shown")
        return
    idle = not words & {"running", "queued"} and holder(run) is None
    if words - {"done", "not taken"} and idle and "holds" not in {stage.gate for stage in stages}:
        print(f"nothing is running; to go on: {_way_on(run, stages)}")


def _print_left_out(run: RunFolder) -> None:
    """The nodes that a run on a cluster leaves out, and why."""
    if run.plan().get("launcher") != "slurm":
        return
    from launch.slurm.left_out import left_out

    for one in left_out(run.journal.read()).values():
        print(f"leaves out {one.node} since {one.since[:19]}: {one.why} (mvl nodes --help)")


def _way_on(run: RunFolder, stages: list[StageStatus]) -> str:
    """The command that goes on: with what was asked for, or where that is done, with the rest."""
    plan = run.plan()
    asked = [stage for stage in stages if stage.stage in plan["selected"]]
    if any(CERTIFICATE_FAILED in stage.reason for stage in stages):
        return f"{submit_again(run)} (after a change of the recipe)"
    if any(stage.status not in ("done", "not taken") for stage in asked):
        return resume(run)
    return submit_again(run)


def _print_runs(found: dict[RunFolder, list[StageStatus]]) -> None:
    rows = []
    for run, stages in found.items():
        done = sum(stage.status == "done" for stage in stages)
        at = next((stage for stage in stages if stage.status != "done"), stages[-1])
        step = f"{at.stage} {at.step}/{at.steps}"
        row = (run.name, overall(stages), f"{done}/{len(stages)}", step, _number(at.loss, ".4f"))
        rows.append((*row, _age(at.age_seconds)))
    names = ("run", "status", "stages", "at", "loss", "age")
    print_table("", names, rows, left=2, styles=STATUS_STYLES)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _age(seconds: float | None) -> str:
    if seconds is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
