"""Shows a run while it works: a live table on a terminal, plain lines in a log.

Reads `metrics.jsonl` only, so what it shows is what the trainer recorded.
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_vl.run.folder import RunFolder, StageFolder

_PLAIN_SECONDS = 5.0
_LIVE_SECONDS = 0.5


class Watcher(Protocol):
    """Something that shows a run; a context manager."""

    def __enter__(self) -> "Watcher": ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...

    def tick(self, stage: StageFolder) -> None:
        """Show what is new about the running stage."""

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


def make_watcher(run: RunFolder) -> Watcher:
    """The watcher that fits where standard output goes."""
    return LiveWatcher(run) if sys.stdout.isatty() else PlainWatcher(run)


class _Base:
    """What both watchers share: the stages' totals and their new metrics."""

    def __init__(self, run: RunFolder, seconds: float) -> None:
        self.steps = {entry["name"]: entry["steps"] for entry in run.plan()["stages"]}
        self._seconds = seconds
        self._next = 0.0
        self._tails: dict[str, Tail] = {}

    def new_lines(self, stage: StageFolder) -> list[dict[str, Any]]:
        """New metrics lines; none when it is too early to look again."""
        if time.monotonic() < self._next:
            return []
        self._next = time.monotonic() + self._seconds
        if stage.name not in self._tails:
            self._tails[stage.name] = Tail(stage.metrics_path)
        return [json.loads(line) for line in self._tails[stage.name].lines()]


class PlainWatcher(_Base):
    """A line every few seconds, for logs and pipes."""

    def __init__(self, run: RunFolder, seconds: float = _PLAIN_SECONDS) -> None:
        super().__init__(run, seconds)

    def __enter__(self) -> "PlainWatcher":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def tick(self, stage: StageFolder) -> None:
        """Print the evaluations and the last step since the last look."""
        lines = self.new_lines(stage)
        for line in lines:
            if "eval" in line:
                self.say(
                    f"{stage.name}: step {line['step']} {line['eval']} loss {line['loss']:.4f}"
                )
        steps = [line for line in lines if "eval" not in line]
        if steps:
            self.say(f"{stage.name}: {step_text(steps[-1], self.steps[stage.name])}")

    def say(self, text: str) -> None:
        """Print a line at once."""
        print(text, flush=True)


class LiveWatcher(_Base):
    """One progress bar a stage, with the latest measurements beside it."""

    def __init__(self, run: RunFolder) -> None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        super().__init__(run, _LIVE_SECONDS)
        self._progress = Progress(
            TextColumn("[bold]{task.description:8}"),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
        )
        self._tasks: dict[str, Any] = {}

    def __enter__(self) -> "LiveWatcher":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def tick(self, stage: StageFolder) -> None:
        """Move the stage's bar."""
        total = self.steps[stage.name]
        if stage.name not in self._tasks:
            task = self._progress.add_task(stage.name, total=total, text="starting")
            self._tasks[stage.name] = task
        steps = [line for line in self.new_lines(stage) if "eval" not in line]
        if steps:
            self._progress.update(
                self._tasks[stage.name],
                completed=steps[-1]["step"],
                text=step_text(steps[-1], total),
            )

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
