"""How much of a pipeline schedule a rank spends computing: megatron-core's `config.timers`.

What: stands where megatron-core's schedules look for timers, and keeps the three kinds that make up
the pipeline bubble: the whole schedule, forward and backward compute, and the gradient reductions
that end it.
Why: the bubble is measured, not derived from the number of micro-batches; uneven stages, waiting
for a neighbour and slow links all show.
What it refuses: nothing. What it costs: two clock readings (on CUDA: two events) a micro-batch and
direction; nothing waits, since the asked-for barriers are not made and events are read after the
step, when they have passed.
"""

import time
from dataclasses import dataclass, field
from typing import Any

import torch

from megatron_vl.engine.platform import PLATFORM

SCHEDULE = "forward-backward"
COMPUTE = ("forward-compute", "backward-compute")
REDUCTIONS = ("grads-sync", "grads-all-reduce")
"""How the names of timers inside megatron-core's gradient reduction end."""


@dataclass
class _Stopwatch:
    """Marks of one timer, start and stop in turn: seconds, or events of a CUDA device."""

    marks: list[Any] = field(default_factory=list)

    def start(self, barrier: bool = False) -> None:
        """Begin a span."""
        self._mark()

    def stop(self, barrier: bool = False) -> None:
        """End it."""
        self._mark()

    def _mark(self) -> None:
        if PLATFORM.device_type != "cuda":
            self.marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append(event)

    def seconds(self) -> float:
        """Of all spans."""
        spans = zip(self.marks[::2], self.marks[1::2], strict=True)
        if PLATFORM.device_type != "cuda":
            return sum(stop - start for start, stop in spans)
        return sum(start.elapsed_time(stop) for start, stop in spans) / 1000


class _Ignored(_Stopwatch):
    """A timer that nobody asks."""

    def _mark(self) -> None:
        pass


class ScheduleTimers:
    """Hands out timers by name, as megatron-core's schedules call for them."""

    def __init__(self) -> None:
        self._watches: dict[str, _Stopwatch] = {}
        self._ignored = _Ignored()

    def __call__(self, name: str, log_level: int | None = None) -> _Stopwatch:
        if name == SCHEDULE or name in COMPUTE or name.endswith(REDUCTIONS):
            return self._watches.setdefault(name, _Stopwatch())
        return self._ignored

    def restart(self) -> None:
        """Forget what was measured: before a step."""
        self._watches.clear()

    def take(self) -> tuple[float, float]:
        """Seconds of compute and of the schedule without its gradient reductions; forgets them.

        On CUDA call it after something has waited for the step, such as reading its loss.
        """
        seconds = {name: watch.seconds() for name, watch in self._watches.items()}
        self.restart()
        compute = sum(seconds.get(name, 0.0) for name in COMPUTE)
        reductions = sum(value for name, value in seconds.items() if name.endswith(REDUCTIONS))
        return compute, seconds.get(SCHEDULE, 0.0) - reductions


def bubble(compute: float, schedule: float) -> float:
    """Share of a schedule's time spent in neither forward nor backward compute."""
    return 1 - compute / schedule if schedule > 0 else 0.0
