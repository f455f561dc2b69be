"""Being asked to stop, by a signal or by the clock: noted at once, acted on between two steps.

Work inside a signal handler corrupts checkpoints and hangs collectives, so a handler only sets a
flag. Before every step the ranks agree on the flags (`train.main`), and all of them save and leave
at the same step. The clock is the job's end, which the launcher states in MVL_JOB_END; the time a
stop needs comes from the saves measured so far.

Signals: USR1 is the warning before a time limit, TERM a request by Slurm, a person or the
supervisor. Imports neither torch nor anything slow, so that a rank can listen before it loads its
packages: a signal that comes earlier still ends the process.
"""

import os
import signal
import time
from enum import IntEnum
from types import FrameType

MARGIN_SECONDS = 15.0
"""Left over after the save: the receipt, and the other ranks' way out."""
LEAST_LEAD_SECONDS = 60


class Stop(IntEnum):
    """What a rank has been asked; of several requests the largest counts."""

    none = 0
    time_limit = 1
    terminated = 2

    @property
    def words(self) -> str:
        """The request as a receipt tells it."""
        return _WORDS[self]


_WORDS = {
    Stop.none: "nobody asked it to stop",
    Stop.time_limit: "its time limit is near",
    Stop.terminated: "asked to stop (SIGTERM: Slurm, `mvl cancel` or Ctrl-C)",
}
_BY_SIGNAL = {signal.SIGUSR1: Stop.time_limit, signal.SIGTERM: Stop.terminated}


class StopRequest:
    """What this process has been asked so far.

    Args:
        job_end: when the job will be ended, in seconds since 1970; None without a limit.
        lead_seconds: how long before that to stop while no save has been measured.
    """

    def __init__(self, job_end: float | None = None, lead_seconds: float = 0.0) -> None:
        self.job_end = job_end
        self.lead_seconds = lead_seconds
        self.asked = Stop.none

    @classmethod
    def from_environment(cls) -> "StopRequest":
        """The limit as the launcher states it: MVL_JOB_END and MVL_LEAD_SECONDS."""
        end = os.environ.get("MVL_JOB_END")
        lead = float(os.environ.get("MVL_LEAD_SECONDS", "0"))
        return cls(float(end) if end else None, lead)

    def listen(self) -> None:
        """Take USR1 and TERM from now on. Call from the main thread."""
        for number in _BY_SIGNAL:
            signal.signal(number, self._note)

    def look(self, save_seconds: float | None, step_seconds: float) -> Stop:
        """The request so far, the clock included.

        Args:
            save_seconds: the longest save measured; None when there was none.
            step_seconds: the longest recent step.
        """
        if self.job_end is not None:
            needed = self.lead_seconds
            if save_seconds is not None:
                needed = seconds_to_stop(save_seconds, step_seconds)
            if time.time() + needed > self.job_end:
                self.asked = max(self.asked, Stop.time_limit)
        return self.asked

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.asked = max(self.asked, _BY_SIGNAL[signal.Signals(number)])


def seconds_to_stop(save_seconds: float, step_seconds: float) -> float:
    """How long before the end a stop must begin: a step and a save, each twice as long as seen."""
    return 2 * save_seconds + 2 * step_seconds + MARGIN_SECONDS
