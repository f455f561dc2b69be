"""Where a run's hours went: useful, lost and waiting, by stage, from the run folder alone.

Useful are the steps and evaluations that the last checkpoint remembers, and of a node the work that
its receipt states; waiting is the time in the queue, when nothing is held; lost is the rest of the
time in which ranks were held: starts, saves, steps done twice, failed attempts. An attempt that was
cut off without a word counts as lost until the next one began, because nobody wrote down when it
ended. Needs no accounting of the cluster.
"""

from dataclasses import dataclass
from datetime import datetime

from launch.attempt import Events
from launch.tables import print_table
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.goodput import useful_seconds
from megatron_vl.run.metrics import read_metrics


@dataclass(frozen=True)
class StageHours:
    """One stage's wall time over all its attempts, in seconds.

    Attributes:
        ranks: that it ran on, for rank hours.
        useful, lost: while ranks were held.
        waiting: in the queue, from when it could have run.
    """

    stage: str
    ranks: int
    attempts: int
    useful: float
    lost: float
    waiting: float


def stage_hours(run: RunFolder) -> list[StageHours]:
    """The hours of every stage that has started."""
    events = run.journal.read()
    found = []
    for stage in run.stages():
        held, waiting, attempts, ranks = 0.0, 0.0, 0, 1
        parents = {other.name for other in run.waits_for(stage)}
        for index, event in enumerate(events):
            if event["stage"] != stage.name:
                continue
            if event["event"] == "started":
                attempts, ranks = attempts + 1, event.get("ranks", 1)
                waiting += _since(events[:index], stage.name, parents, event["time"])
                begun = event["time"]
            elif event["event"] == "ended" and attempts:
                held += _seconds(begun, event["time"])
        if attempts:
            useful = _useful(stage)
            lost = max(0.0, held - useful)
            found.append(StageHours(stage.name, ranks, attempts, useful, lost, waiting))
    return found


def _useful(stage: StageFolder) -> float:
    """Of a stage what its last checkpoint remembers; of a node the attempt that did it."""
    receipt = stage.receipt()
    if receipt is not None and receipt.kind != "train":
        return receipt.seconds.useful
    return useful_seconds(read_metrics(stage.metrics_path))


def hour_rows(hours: list[StageHours]) -> list[dict[str, str]]:
    """The same as people read it, by column."""
    return [
        {
            "stage": one.stage,
            "ranks": f"{one.ranks:,}",
            "attempts": str(one.attempts),
            "useful": _text(one.useful),
            "lost": _text(one.lost),
            "in the queue": _text(one.waiting),
            "useful share": f"{one.useful / (one.useful + one.lost or 1):.0%}",
            "rank hours": f"{one.ranks * (one.useful + one.lost) / 3600:,.2f}",
        }
        for one in hours
    ]


def print_hours(hours: list[StageHours]) -> None:
    """A table of them on the terminal."""
    rows = hour_rows(hours)
    if rows:
        cells = [tuple(row.values()) for row in rows]
        print_table("where the hours went", tuple(rows[0]), cells, left=1)


def _since(before: Events, stage: str, parents: set[str], start: str) -> float:
    """How long a start had been waited for: since the stage could have run."""
    marks = [
        event["time"]
        for event in before
        if (event["event"] == "ended" and event["stage"] in {stage, *parents})
        or (event["event"] in ("submitted", "released") and event["stage"] in (stage, None))
    ]
    return _seconds(marks[-1], start) if marks else 0.0


def _seconds(begun: str, ended: str) -> float:
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(begun)).total_seconds()


def _text(seconds: float) -> str:
    return f"{seconds / 3600:,.2f} h" if seconds >= 3600 else f"{seconds:,.0f} s"
