"""Which nodes a run leaves out by now, told by its journal; imports little, for `mvl status`.

The events `examined` (a look found nodes sick), `excluded` and `readmitted` (a person's word) are
read in order, and the last word on a node counts. Refuses names that Slurm could not hold.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launch.attempt import Events

NODE = re.compile(r"[A-Za-z0-9_.-]+")


@dataclass(frozen=True)
class LeftOut:
    """A node that a run leaves out: since when, why, and by whom (a stage's look, or a person)."""

    node: str
    since: str
    why: str
    by: str


def left_out(events: "Events") -> dict[str, LeftOut]:
    """The nodes a run leaves out by now, by name, in the order they were put aside."""
    found: dict[str, LeftOut] = {}
    for event in events:
        if event["event"] == "examined":
            by = f"{event['stage']}, attempt {event['attempt']}"
            put = {n: LeftOut(n, event["time"], why, by) for n, why in event["sick"].items()}
        elif event["event"] == "excluded":
            put = {n: LeftOut(n, event["time"], event["why"], event["who"]) for n in event["nodes"]}
        elif event["event"] == "readmitted":
            put = {}
            for node in event["nodes"]:
                found.pop(node, None)
        else:
            continue
        found |= {node: out for node, out in put.items() if NODE.fullmatch(node)}
    return found


def ever_left_out(events: "Events") -> bool:
    """Whether a run has ever left a node out, so that a job's own list of them may be stale."""
    return any(event["event"] == "excluded" or event.get("sick") for event in events)
