"""Why an attempt ended, in words a person can act on: from exit statuses and what ranks printed.

When one rank raises, the others lose their connection to it and raise too, and which of them ends
first is chance. The rank to name is one that says something of its own; a rank that only says that
a connection broke comes last. Costs one read of each rank's log.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from launch.local import RankResult, describe_end
from megatron_vl.run.folder import StageFolder
from megatron_vl.run.receipt import Status

_TAIL_LINES = 15
_MESSAGE_LINES = 8
_ECHOES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "DistNetworkError",
    "DistBackendError",
    "Timed out waiting",
    "the supervisor of this rank has gone away",
)
_FRAME = re.compile(r'  File "(?P<file>[^"]+)", line (?P<line>\d+)')
_RANK_MARK = re.compile(r"^\[rank\d+\]: ?")  # torch marks the traceback of a rank so
_OTHERS = ("[", "frame #", "Exception raised from", "Traceback", "slurmstepd", "srun: ")
_CLEAN = re.compile(r"^mvl (?:train|node): ")
_WARNING = re.compile(r":\d+: \w*Warning: ")
_OURS = re.compile(r"(?:^|/)((?:megatron_vl|launch)/.+)$")


def why(
    stage: StageFolder, attempt: int, result: RankResult | None, trouble: BaseException | None
) -> tuple[Status, str]:
    """Status and reason of an attempt whose trainer wrote no receipt."""
    if result is None:
        if not isinstance(trouble, KeyboardInterrupt):
            return "failed", f"the supervisor met {type(trouble).__name__}: {trouble}"
        return "incomplete", "stopped by a person (Ctrl-C, mvl cancel or SIGTERM) before its end"
    if result.first_failed is None:
        return "failed", "all ranks exited with status 0, but the trainer wrote no receipt"
    logs = [stage.attempt_path(attempt) / f"rank_{rank}.log" for rank in range(len(result.codes))]
    rank, said = culprit(result, dict(enumerate(logs)))
    ending = f"rank {rank} {describe_end(result.codes[rank])}"
    where = logs[rank].relative_to(stage.path)
    if said:
        return "failed", f"{ending}: {said}\nall it printed: {where}"
    if result.codes[rank] < 0:
        return "failed", f"{ending}\nall it printed: {where}"
    tail = last_lines(logs[rank])
    return "failed", ending + (f"; the end of {where}:\n{tail}" if tail else "; it printed nothing")


def culprit(result: RankResult, logs: Mapping[int, Path]) -> tuple[int, str]:
    """The rank that ended the attempt and the exception it ended with ("" when it named none).

    `logs` are by rank; those of ranks that left none, or that nobody reads, are missing.
    """
    first = result.first_failed
    assert first is not None
    said = {first: ""} | {rank: last_exception(log) for rank, log in logs.items()}
    if result.codes[first] < 0:
        return first, ""  # ended by a signal: what others say is about its absence
    own = [rank for rank, text in said.items() if text and not is_echo(text)]
    if is_echo(said[first]) and own:
        return own[0], said[own[0]]
    return first, said[first]


def is_echo(text: str) -> bool:
    """Whether an exception only tells that another rank has gone."""
    return any(mark in text for mark in _ECHOES)


def last_exception(log: Path) -> str:
    """The exception a program ended with, as its log tells: type, message and place.

    Or the one message `mvl` prints for an error that needs no traceback; "" when there is neither.
    """
    lines = _read_lines(log)
    starts = [i for i, line in enumerate(lines) if line.startswith("Traceback (most recent")]
    if not starts:
        clean = [i for i, line in enumerate(lines) if _CLEAN.match(line)]
        return _CLEAN.sub("", _message(lines[clean[-1] :])) if clean else ""
    block, place = lines[starts[-1] + 1 :], ""
    for index, line in enumerate(block):
        frame = _FRAME.match(line)
        ours = _OURS.search(frame["file"]) if frame else None
        if frame and ours:
            place = f" ({ours[1]}:{frame['line']})"
        if line and not line[0].isspace():
            message = _message(block[index:])
            head, newline, rest = message.partition("\n")
            return f"{head}{place}{newline}{rest}"
    return ""


def last_lines(log: Path, count: int = _TAIL_LINES) -> str:
    """The last lines of a log, without blank ones and warnings; empty when there is no log."""
    kept: list[str] = []
    after_warning = False
    for line in _read_lines(log):
        source = after_warning and line.startswith("  ")  # Python prints the line it warns about
        after_warning = _WARNING.search(line) is not None
        if line and not source and not after_warning:
            kept.append(line)
    return "\n".join(kept[-count:])


def _message(lines: list[str]) -> str:
    """An exception's line and those that belong to it: up to a blank or a line of another kind."""
    found = lines[:1]
    for line in lines[1:_MESSAGE_LINES]:
        if not line or line.startswith(_OTHERS):
            break
        found.append(line)
    return "\n".join(found)


def _read_lines(log: Path) -> list[str]:
    if not log.exists():
        return []
    lines = log.read_text("utf-8", errors="replace").splitlines()
    return [_RANK_MARK.sub("", line).rstrip() for line in lines]
