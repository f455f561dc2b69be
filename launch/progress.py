"""How far a long command is: a bar on a terminal, a line now and then in a log.

Both go to standard error, so that what a command prints can be read by a program. Commands that end
within a few seconds print nothing.
"""

import sys
import time
from types import TracebackType
from typing import Any, Self

from launch.summary import duration

_PLAIN_SECONDS = 5.0


class Meter:
    """Shows what is being done, how much of it is done, and of how much. A context manager."""

    def __init__(self, *, live: bool | None = None) -> None:
        self._live = sys.stderr.isatty() if live is None else live
        self._bar: Any = None
        self._task: Any = None
        self._doing = ""
        self._begun = self._spoken = time.monotonic()

    def __enter__(self) -> Self:
        if self._live:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                TextColumn("{task.completed:,.0f}/{task.total:,.0f}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                transient=True,
                refresh_per_second=4,
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, doing: str, done: int, total: int) -> None:
        """Say that `done` of `total` are done; a total of 0 is one that is not known."""
        if doing != self._doing:
            self._doing, self._begun = doing, time.monotonic()
            if self._bar is not None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(doing, total=max(total, 1))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=max(total, 1))
        elif time.monotonic() - self._spoken >= _PLAIN_SECONDS:
            self._spoken = time.monotonic()
            much = f": {done:,}/{total:,}{self._left(done, total)}" if total else ""
            print(doing + much, file=sys.stderr, flush=True)

    def _left(self, done: int, total: int) -> str:
        spent = time.monotonic() - self._begun
        if not done or spent < 1:
            return ""
        return f", {duration(spent * (total - done) / done)} left"
