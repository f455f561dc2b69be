"""How much of a stage's wall time became training that its checkpoint remembers.

What: goodput over all attempts, from `metrics.jsonl`, the journal and the receipts of attempts.
Why: a step that a restart does again, a save, a queue between two attempts cost as much as idle
devices; a rank's own clock sees none of the last two.
What it refuses: nothing. What it costs: one read of `metrics.jsonl`; no torch.
"""

from datetime import datetime
from typing import Any

from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import eval_lines, read_metrics, step_lines
from megatron_vl.run.receipt import now, read_receipt


def goodput(run: RunFolder, stage: StageFolder, started: str, ended: str | None = None) -> float:
    """Useful seconds over all wall seconds since the stage's first attempt began.

    Useful are steps, without their waits for data, and evaluations; of those done twice the last.

    Args:
        started: when the asking attempt began, ISO 8601.
        ended: until when; now, if None.

    Returns:
        From 0 to 1.
    """
    began = min(_starts(run, stage), default=datetime.fromisoformat(started))
    began = min(began, datetime.fromisoformat(started))
    wall = (datetime.fromisoformat(ended or now()) - began).total_seconds()
    useful = useful_seconds(read_metrics(stage.metrics_path))
    # Times are written in whole seconds: a stage of a few may seem shorter than its steps.
    return useful / max(wall, useful) if useful else 0.0


def useful_seconds(records: list[dict[str, Any]]) -> float:
    """Seconds of the steps and evaluations among `read_metrics` lines, data waits left out."""
    steps = sum(line["seconds"] - line.get("data_wait_s", 0.0) for line in step_lines(records))
    return steps + sum(line.get("seconds", 0.0) for line in eval_lines(records))


def _starts(run: RunFolder, stage: StageFolder) -> list[datetime]:
    """When attempts of the stage began, as the journal and earlier receipts tell."""
    told = [
        event["time"]
        for event in run.journal.read()
        if event["event"] == "started" and event["stage"] == stage.name
    ]
    for number in range(1, stage.last_attempt()):
        path = stage.attempt_path(number) / "receipt.json"
        if path.exists():
            told.append(read_receipt(path).started)
    return [datetime.fromisoformat(time) for time in told]
