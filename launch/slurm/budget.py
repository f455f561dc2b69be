"""Whether a stage is started again after an attempt: what ended it, how often, what it gained.

A pure function of the site's budgets and the journal. Budgets count from the last time a person
submitted or resumed the stage.
"""

from dataclasses import dataclass

from launch.attempt import Events
from launch.causes import RETRIED, Cause
from launch.site_schema import RequeueSection


@dataclass(frozen=True)
class Ending:
    """How one attempt ended."""

    cause: Cause
    progressed: bool
    """Whether it left a checkpoint further than the one it began from."""


@dataclass(frozen=True)
class Decision:
    """What follows an attempt."""

    again: bool
    reason: str
    """Why not again; empty otherwise."""


def decide(ending: Ending, earlier: list[Ending], budgets: RequeueSection) -> Decision:
    """Whether to start again. `earlier` are the endings before this one, oldest first."""
    cause = ending.cause
    if cause not in RETRIED:
        return Decision(False, f"{cause.value} is never tried again by itself")
    if not budgets.enabled:
        return Decision(False, "requeue.enabled is false on this site")
    budget = int(getattr(budgets, cause.value))
    used = sum(one.cause is cause for one in earlier)
    if used >= budget:
        return Decision(False, f"requeue.{cause.value} allows {budget} starts, all are used")
    barren = 0
    for one in [ending, *reversed(earlier)]:
        if one.progressed:
            break
        barren += 1
    allowed = budgets.without_progress if cause.is_external else int(cause is Cause.crashed)
    if barren > allowed:
        times = "this attempt" if barren == 1 else f"{barren} attempts in a row"
        return Decision(False, f"{times} ended without a new checkpoint; the next would end so too")
    return Decision(True, "")


def endings(events: Events, stage: str) -> list[Ending]:
    """The endings of a stage since a person last submitted it, oldest first."""
    found: list[Ending] = []
    for event in events:
        if event["stage"] != stage:
            continue
        if event["event"] == "submitted":
            found = []
        elif event["event"] == "ended" and event.get("cause"):
            found.append(Ending(Cause(event["cause"]), bool(event["progressed"])))
    return found
