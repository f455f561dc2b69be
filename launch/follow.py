"""Shows a run while it works: bars on a terminal, plain lines in a log.

What it shows is what the trainer recorded in `metrics.jsonl` and said in rank 0's log. Both say
something at least every few seconds, also while ranks only load their packages: a person should
never have to wonder whether anything is happening.
"""

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from launch.summary import duration
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import OWN_SET, is_step
from megatron_vl.run.receipt import Receipt

_POLL_SECONDS = 0.25
_PLAIN_SECONDS = 2.0
_QUIET_SECONDS = 5.0
_MOST_QUIET_SECONDS = 60.0


class Watcher(Protocol):
    """Something that shows a run; a context manager."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def begin(self, stage: StageFolder, attempt: int) -> None:
        """An attempt is about to start."""

    def tick(self, stage: StageFolder) -> None:
        """Show what is new about the running stage; called a few times a second."""

    def end(self, stage: StageFolder, receipt: Receipt) -> None:
        """The attempt is over, or the stage was done before."""

    def say(self, text: str) -> None:
        """Print a line."""


class Tail:
    """Reads the lines that were appended to a file since the last look."""

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset = path.stat().st_size if from_end and path.exists() else 0

    def lines(self) -> Iterator[str]:
        """The new, complete lines."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._offset)
            new = file.read()
        whole, newline, _ = new.rpartition(b"\n")
        self._offset += len(whole) + len(newline)
        if newline:
            yield from whole.decode("utf-8", errors="replace").split("\n")


class Feed:
    """What happens in one attempt: its measurements, its words, and how far it has come."""

    def __init__(self, stage: StageFolder, attempt: int, steps: int) -> None:
        self.steps = steps
        self.last: dict[str, Any] | None = None
        self.held_out: dict[str, Any] | None = None
        self._name = stage.name
        self._metrics = Tail(stage.metrics_path, from_end=True)
        self._log = Tail(stage.attempt_path(attempt) / "rank_0.log")
        self._recent: deque[float] = deque(maxlen=20)
        self._said = ""
        self._begun = time.monotonic()

    def read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The trainer's new words (measurements left out) and the new metrics lines."""
        words = []
        for line in self._log.lines():
            _, mark, text = line.partition(f"[{self._name}] ")
            if mark and not text.startswith("step ") and line.startswith(mark):
                words.append(text)
                self._said = text
        lines = [json.loads(line) for line in self._metrics.lines()]
        for line in lines:
            if line.get("eval") == OWN_SET:
                self.held_out = line
            elif is_step(line):
                self.last = line
                self._recent.append(float(line["seconds"]))
        return words, lines

    @property
    def age(self) -> float:
        """Seconds since the attempt began."""
        return time.monotonic() - self._begun

    @property
    def eta(self) -> float | None:
        """Seconds until the last step, from the latest steps; None before the first."""
        if self.last is None:
            return None
        left = self.steps - int(self.last["step"])
        return left * sum(self._recent) / len(self._recent)

    def doing(self) -> str:
        """What is going on when there is no news."""
        if self.last is None:
            return self._said or "starting: loading its packages"
        if self.last["step"] >= self.steps:
            return "all steps done; evaluates, saves and ends"
        return f"works on step {self.last['step'] + 1}/{self.steps}"


def make_watcher(run: RunFolder) -> Watcher:
    """The watcher that fits where standard output goes."""
    return LiveWatcher(run) if sys.stdout.isatty() else PlainWatcher(run)


class _Base:
    """What both watchers share: the feed of the running attempt, read at a steady pace."""

    def __init__(self, run: RunFolder) -> None:
        plan = run.plan()
        self.selected: list[str] = plan["selected"]
        self.steps = {entry["name"]: entry["steps"] for entry in plan["stages"]}
        self.feed: Feed | None = None
        self._next_look = 0.0

    def open_feed(self, stage: StageFolder, attempt: int) -> None:
        """Start to follow an attempt; what earlier attempts measured is not news."""
        self.feed = Feed(stage, attempt, self.steps[stage.name])

    def look(self, *, now: bool) -> tuple[list[str], list[dict[str, Any]]] | None:
        """The feed's news; None when it is too early to look again."""
        if self.feed is None or (not now and time.monotonic() < self._next_look):
            return None
        self._next_look = time.monotonic() + _POLL_SECONDS
        return self.feed.read()


class PlainWatcher(_Base):
    """Lines for logs and pipes: every event at once, steps no more often than every two seconds."""

    def __init__(self, run: RunFolder, seconds: float = _PLAIN_SECONDS) -> None:
        super().__init__(run)
        self._seconds = seconds
        self._next_step = 0.0
        self._quiet = _QUIET_SECONDS
        self._spoken = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def begin(self, stage: StageFolder, attempt: int) -> None:
        """Follow an attempt."""
        self.open_feed(stage, attempt)
        self._quiet = _QUIET_SECONDS

    def tick(self, stage: StageFolder) -> None:
        """Print what is new, or after a silence what is going on."""
        news = self.look(now=False)
        if news is None:
            return
        self._print(stage, *news)
        if self.feed is not None and time.monotonic() - self._spoken > self._quiet:
            self.say(f"{stage.name}: {self.feed.doing()} ({duration(self.feed.age)} so far)")
            self._quiet = min(2 * self._quiet, _MOST_QUIET_SECONDS)

    def end(self, stage: StageFolder, receipt: Receipt) -> None:
        """Print what came since the last look."""
        news = self.look(now=True)
        if news is not None:
            self._print(stage, *news)
        self.feed = None

    def say(self, text: str) -> None:
        """Print a line at once."""
        self._spoken = time.monotonic()
        print(text, flush=True)

    def _print(self, stage: StageFolder, words: list[str], lines: list[dict[str, Any]]) -> None:
        assert self.feed is not None
        for text in words:
            self.say(f"{stage.name}: {text}")
        total = self.steps[stage.name]
        for line in lines:
            if line.get("eval") == OWN_SET:
                self.say(f"{stage.name}: {held_out_text(line, total)}")
            elif is_step(line) and (line["step"] == total or time.monotonic() >= self._next_step):
                self._next_step = time.monotonic() + self._seconds
                self.say(f"{stage.name}: {step_text(line, total)}{_eta_text(self.feed)}")
                self._quiet = _QUIET_SECONDS


class LiveWatcher(_Base):
    """One progress bar for each selected stage, with the latest measurements beside it."""

    def __init__(self, run: RunFolder) -> None:
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.table import Column

        super().__init__(run)
        self._progress = Progress(
            TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=16),
            TextColumn("{task.completed:g}/{task.total:g}", justify="right"),
            TextColumn("{task.fields[elapsed]}", justify="right"),
            TextColumn(
                "{task.fields[text]}",
                markup=False,
                table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1),
            ),
            expand=True,
            transient=True,
            refresh_per_second=4,
        )
        self._tasks = {
            name: self._progress.add_task(name, total=self.steps[name], text="waits", elapsed="")
            for name in self.selected
        }

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def begin(self, stage: StageFolder, attempt: int) -> None:
        """Start the stage's bar."""
        self.open_feed(stage, attempt)

    def tick(self, stage: StageFolder) -> None:
        """Move the stage's bar."""
        news = self.look(now=False)
        if news is not None and self.feed is not None:
            done = self.feed.last["step"] if self.feed.last else 0
            self._progress.update(
                self._tasks[stage.name],
                completed=done,
                text=_live_text(self.feed),
                elapsed=duration(self.feed.age),
            )

    def end(self, stage: StageFolder, receipt: Receipt) -> None:
        """Leave the bar as the stage ended."""
        task = self._tasks[stage.name]
        text: str = receipt.status
        if self.look(now=True) is not None and self.feed is not None and self.feed.held_out:
            text += f"  held-out {self.feed.held_out['loss']:.4f}"
        self._progress.update(task, completed=receipt.step, text=text)
        self.feed = None

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)


def step_text(line: dict[str, Any], total: int) -> str:
    """A step's measurements in one short line."""
    loss, rate = float(line["loss"]), float(line["lr"])
    return (
        f"step {line['step']}/{total}  loss {loss:.4f}  lr {rate:.2e}  "
        f"{float(line['tokens_per_s']):,.0f} tokens/s"
    )


def held_out_text(line: dict[str, Any], total: int) -> str:
    """A held-out loss in one short line."""
    return f"step {line['step']}/{total}  held-out loss {float(line['loss']):.4f} ({line['eval']})"


def _eta_text(feed: Feed) -> str:
    eta = feed.eta
    return f"  {duration(eta)} left" if eta else ""


def _live_text(feed: Feed) -> str:
    """The latest measurements beside a bar, the most wanted first: a narrow terminal cuts."""
    if feed.last is None or feed.last["step"] >= feed.steps:
        return feed.doing()
    text = f"loss {float(feed.last['loss']):.4f}"
    if feed.held_out is not None:
        text += f"  held-out {float(feed.held_out['loss']):.4f}"
    return f"{text}{_eta_text(feed)}  {float(feed.last['tokens_per_s']):,.0f} tokens/s"
