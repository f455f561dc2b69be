"""What is known of how a job's attempt ended: from srun, from Slurm, from the ranks' logs.

Each source may be missing or cut off: a lost node says nothing. Costs one read of each rank's log.
"""

import re
import signal
from collections.abc import Mapping
from pathlib import Path

from launch.attempt import Events
from launch.causes import Evidence
from launch.local import RankResult, describe_end
from launch.reasons import culprit, last_lines
from megatron_vl.run.folder import StageFolder

BEGIN_MARK = "job: attempt {attempt} begins"
"""The line in a job's output from which on it is about an attempt."""
_MOST_LOGS = 64
_TAIL = 4000
_TASKS = re.compile(r"srun: error: \S+: tasks? (?P<tasks>[\d,-]+): (?P<end>.+)")
_CODES = re.compile(r"Exited with exit code (\d+)")
_SIGNALS = {signal.strsignal(number): int(number) for number in signal.valid_signals()}


def gather(stage: StageFolder, attempt: int, events: Events, slurm: str = "") -> "Account":
    """Everything on disk about an attempt; `slurm` is what `scontrol show job` said at its end."""
    folder = stage.attempt_path(attempt)
    step = _read(folder / "srun.log")
    output = _since(_read(_output(stage, attempt, events)), BEGIN_MARK.format(attempt=attempt))
    found = {_rank(path): path for path in folder.glob("rank_*.log")}
    result = step_result(step, max(found, default=-1) + 1)
    logs = {rank: found[rank] for rank in _worth_reading(result, found)}
    rank, said = culprit(result, logs) if result.first_failed is not None else (0, "")
    killed = result.first_failed is not None and result.codes[rank] == -signal.SIGKILL
    evidence = Evidence(
        said=said,
        printed="\n".join(last_lines(log) for log in logs.values()),
        slurm="\n".join([step, output, slurm]),
        killed=killed,
        cancelled=_cancelled(stage, attempt, events) or "JobState=CANCELLED" in slurm,
    )
    return Account(evidence, result, rank, logs.get(rank), step, output)


def _worth_reading(result: RankResult, found: Mapping[int, Path]) -> list[int]:
    """The ranks whose logs are read: the one that failed first, others that failed, then the rest.

    Of thousands of ranks most only say that another has gone.
    """
    failed = [rank for rank, code in enumerate(result.codes) if code]
    first = [] if result.first_failed is None else [result.first_failed]
    order = dict.fromkeys([*first, *failed, *sorted(found)])
    return [rank for rank in order if rank in found][:_MOST_LOGS]


class Account:
    """The evidence of an ending, and where it was found."""

    def __init__(
        self,
        evidence: Evidence,
        result: RankResult,
        rank: int,
        log: Path | None,
        step: str,
        output: str,
    ) -> None:
        self.evidence = evidence
        self.result = result
        self.rank = rank
        self.log = log
        self.step = step
        self.output = output

    @property
    def ending(self) -> str:
        """How the rank to name ended, in words; empty when srun told of none."""
        if self.result.first_failed is None:
            return ""
        words = f"rank {self.rank} {describe_end(self.result.codes[self.rank])}"
        return f"{words}: {self.evidence.said}" if self.evidence.said else words

    @property
    def slurm_words(self) -> list[str]:
        """What Slurm itself wrote, line by line."""
        lines = [*self.step.splitlines(), *self.output.splitlines()]
        marks = ("error: ***", "srun: error", "slurmstepd: error")
        return [line for line in lines if any(mark in line for mark in marks)]


def step_result(text: str, num_ranks: int) -> RankResult:
    """Exit statuses by rank, from what srun prints; the rank it names first failed first."""
    codes: dict[int, int] = {}
    for found in _TASKS.finditer(text):
        code = _CODES.search(found["end"])
        name = found["end"].partition(" (core dumped)")[0].strip()
        number = int(code[1]) if code else -_SIGNALS.get(name, int(signal.SIGKILL))
        for rank in _expand(found["tasks"]):
            codes.setdefault(rank, number)
    first = next(iter(codes), None)
    size = max([num_ranks, *(rank + 1 for rank in codes)], default=0)
    return RankResult([codes.get(rank, 0) for rank in range(size)], first)


def _expand(text: str) -> list[int]:
    """The numbers of a list such as `0-2,5`."""
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        found += range(int(first), int(last) + 1) if dash else [int(first)]
    return found


def _rank(path: Path) -> int:
    number = path.stem.removeprefix("rank_")
    return int(number) if number.isdigit() else 0


def _output(stage: StageFolder, attempt: int, events: Events) -> Path:
    """The output of the job that made an attempt."""
    started = ("started", stage.name, attempt)
    jobs = [e["job"] for e in events if (e["event"], e["stage"], e["attempt"]) == started]
    return stage.path / f"slurm-{jobs[-1] if jobs else None}.out"


def _cancelled(stage: StageFolder, attempt: int, events: Events) -> bool:
    """Whether a person cancelled the stage's job after the attempt began."""
    since = False
    for event in events:
        if event["stage"] == stage.name:
            since = since or (event["event"], event["attempt"]) == ("started", attempt)
            if since and event["event"] == "cancelled":
                return True
    return False


def _since(text: str, mark: str) -> str:
    _, found, after = text.rpartition(mark)
    return after[-_TAIL:] if found else ""


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace")[-(1 << 20) :]
    except OSError:
        return ""
