"""`mvl status`: how the runs of a folder, or the stages of one run, stand.

Reads plans, receipts and metrics; imports neither torch nor the config loader, and answers in under
half a second on a login node.
"""

import json
import shlex
import time
from argparse import Namespace
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from launch import exit_codes
from launch.lock import holder
from launch.tables import STATUS_STYLES, print_table
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.metrics import eval_lines, read_metrics, step_lines


@dataclass(frozen=True)
class StageStatus:
    """How one stage stands, from the files alone."""

    stage: str
    status: str
    """A receipt's status, or waiting, running, lost (started, no receipt, nobody runs it)."""
    attempt: int
    step: int
    steps: int
    loss: float | None
    eval_loss: float | None
    tokens_per_s: float | None
    age_seconds: float | None
    """Since the receipt, or since the last measurement of a running stage."""
    reason: str


def run_status(run: RunFolder) -> list[StageStatus]:
    """The stages of a run in order; skipped ones are left out. Raises RunError, ReceiptError."""
    totals = {entry["name"]: entry["steps"] for entry in run.plan()["stages"]}
    alive = holder(run) is not None
    return [_stage_status(stage, totals[stage.name], alive) for stage in run.stages()]


def overall(stages: list[StageStatus]) -> str:
    """One word for a run: that of the first stage that is not done.

    `partial` when some stages are done and nothing has gone wrong: nobody has asked for the others,
    or a supervisor is about to start the next.
    """
    word = next((stage.status for stage in stages if stage.status != "done"), "done")
    return "partial" if word == "waiting" and stages[0].status == "done" else word


def main(args: Namespace) -> int:
    """Print the table of one run, or of all runs of a folder."""
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
        raise RunError(f"{folder}: no run here, and no folder of runs (nothing holds a plan.yaml)")
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


def _stage_status(stage: StageFolder, steps: int, alive: bool) -> StageStatus:
    receipt, attempt = stage.receipt(), stage.last_attempt()
    records = read_metrics(stage.metrics_path)
    trained, evaluated = step_lines(records), eval_lines(records)
    last = trained[-1] if trained else {}
    status: str
    age: float | None
    if receipt is not None:
        status, step, reason = receipt.status, receipt.step, receipt.reason
        age = time.time() - datetime.fromisoformat(receipt.ended).timestamp()
    else:
        status = "waiting" if attempt == 0 else ("running" if alive else "lost")
        step, reason = last.get("step", 0), ""
        age = time.time() - stage.metrics_path.stat().st_mtime if last else None
    return StageStatus(
        stage=stage.name,
        status=status,
        attempt=attempt,
        step=step,
        steps=steps,
        loss=last.get("loss"),
        eval_loss=evaluated[-1]["loss"] if evaluated else None,
        tokens_per_s=last.get("tokens_per_s"),
        age_seconds=None if age is None else round(max(0.0, age), 1),
        reason=reason,
    )


def _print_run(run: RunFolder, stages: list[StageStatus]) -> None:
    names = ("stage", "status", "attempt", "step", "loss", "held-out", "tokens/s", "age")
    rows = [
        (
            stage.stage,
            stage.status,
            str(stage.attempt or ""),
            f"{stage.step}/{stage.steps}",
            _number(stage.loss, ".4f"),
            _number(stage.eval_loss, ".4f"),
            _number(stage.tokens_per_s, ",.0f"),
            _age(stage.age_seconds),
        )
        for stage in stages
    ]
    print_table(f"{run.path}: {overall(stages)}", names, rows, left=2, styles=STATUS_STYLES)
    for stage in stages:
        if stage.status in ("failed", "held", "incomplete"):
            print(f"{stage.stage}: {stage.reason}")
        if stage.status == "lost":
            print(f"{stage.stage}: its supervisor is gone")
    if overall(stages) != "done" and holder(run) is None:
        plan = run.plan()
        words = ["mvl", "submit", plan["recipe"], "--run", str(run.path), *plan["overrides"]]
        print(f"nothing is running; to go on: {shlex.join(words)}")


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
