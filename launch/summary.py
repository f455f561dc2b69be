"""The table at the end of `mvl submit --follow`: what each stage came to, in one line."""

from collections.abc import Sequence

from launch.tables import STATUS_STYLES, print_table
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.journal import wall_seconds
from megatron_vl.run.metrics import eval_lines, read_metrics, step_lines


def print_summary(run: RunFolder, names: Sequence[str]) -> None:
    """Print how the named stages ended. Losses of different stages are on different data."""
    spent = wall_seconds(run.journal.read())
    totals = {entry["name"]: entry["steps"] for entry in run.plan()["stages"]}
    rows = [
        (stage.name, *_row(stage, totals[stage.name]), duration(spent.get(stage.name)))
        for stage in run.stages()
        if stage.name in names
    ]
    columns = ("stage", "status", "steps", "loss", "held-out loss", "wall time")
    print_table("", columns, rows, left=2, styles=STATUS_STYLES)


def first_to_last(lines: Sequence[dict]) -> str:
    """The first and the last loss of measurements, as `7.6413 -> 3.1947`."""
    if not lines:
        return ""
    last = f"{lines[-1]['loss']:.4f}"
    return last if len(lines) == 1 else f"{lines[0]['loss']:.4f} -> {last}"


def duration(seconds: float | None) -> str:
    """A length of time with two figures, such as `1 min 35 s`; empty for None."""
    if seconds is None:
        return ""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def _row(stage: StageFolder, total: int) -> tuple[str, ...]:
    receipt = stage.receipt()
    records = read_metrics(stage.metrics_path)
    status = receipt.status if receipt else "waiting"
    step = receipt.step if receipt else 0
    steps = f"{step}/{total}" if total else ""
    return status, steps, first_to_last(step_lines(records)), first_to_last(eval_lines(records))
