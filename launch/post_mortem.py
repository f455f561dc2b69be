"""The page a person finds when a stage is held: what ended it, the evidence, what to try."""

from dataclasses import dataclass, field
from pathlib import Path

from launch.causes import CHANGED_FILES, Cause, advice
from launch.reasons import last_lines
from launch.way_on import resume, submit_again
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder, StageFolder

PAGE = "post_mortem.md"
_LINES = 20


@dataclass(frozen=True)
class Findings:
    """What the page is made from.

    Attributes:
        cause: the class of the ending.
        ending: how it ended, in a line or a few.
        decision: why it is not tried again.
        log: the log to quote; None when no rank wrote one.
        slurm: what Slurm wrote.
        facts: further lines, by name.
    """

    cause: Cause
    ending: str
    decision: str
    log: Path | None
    slurm: list[str] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)


def write_post_mortem(run: RunFolder, stage: StageFolder, attempt: int, findings: Findings) -> Path:
    """Write the page into the attempt's folder; returns its path."""
    path = stage.attempt_path(attempt) / PAGE
    atomic.write_text(path, _page(run, stage, attempt, findings))
    return path


def _page(run: RunFolder, stage: StageFolder, attempt: int, found: Findings) -> str:
    changed = found.cause in CHANGED_FILES
    then = submit_again(run) if changed else resume(run, stage.name)
    lines = [f"# {stage.name}, attempt {attempt}: {found.cause.value}", ""]
    lines += [found.ending, "", f"Held: {found.decision}.", "", "## What to try", ""]
    lines += [advice(found.cause), "", f"Then: `{then}`", ""]
    if found.facts:
        lines += ["## Facts", "", *(f"- {key}: {value}" for key, value in found.facts.items()), ""]
    if found.slurm:
        lines += ["## What Slurm wrote", "", *_block(found.slurm[-_LINES:])]
    if found.log is not None:
        where = found.log.relative_to(stage.path)
        lines += [f"## The end of {where}", "", *_block(last_lines(found.log, _LINES).split("\n"))]
    return "\n".join(lines)


def _block(lines: list[str]) -> list[str]:
    """Lines as they are; a fence inside them cannot end the block."""
    return ["~~~~~~", *(line.replace("~~~~~~", "~~~~~ ~") for line in lines), "~~~~~~", ""]
