"""Being asked to stop, by a signal or by the clock: looked for between two steps, nowhere else.

The signals are blocked and stay pending until a rank looks. So nothing is interrupted, no
collective, no save, and none of the threads and processes a rank starts: they inherit the block.
(Slurm and the supervisor signal whole process groups, and a helper of multiprocessing that dies of
a signal takes its rank along. Saves are written by a thread for that.) Beside the block stands a
handler that only sets a flag, in case a library unblocks: multiprocessing does so with TERM when it
starts its resource tracker, which is therefore started here. That is one more small process for
each rank.

Before every step the ranks agree on what they were asked (`train.main`), and all of them save and
leave at the same step. The clock is the job's end, which the launcher states in MVL_JOB_END; the
time a stop needs comes from the saves measured so far.

Signals: USR1 is the warning before a time limit, TERM a request by Slurm, a person or the
supervisor. Imports neither torch nor anything slow, because a rank must listen before it starts its
first thread; a signal that comes earlier ends the process. What a rank gets while it loads is
acted on before its first step, or cut short by the kill that follows a TERM.
"""

import os
import signal
import time
from enum import IntEnum
from multiprocessing import resource_tracker
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
        self._listens = False

    @classmethod
    def from_environment(cls) -> "StopRequest":
        """The limit as the launcher states it: MVL_JOB_END and MVL_LEAD_SECONDS."""
        end = os.environ.get("MVL_JOB_END")
        lead = float(os.environ.get("MVL_LEAD_SECONDS", "0"))
        return cls(float(end) if end else None, lead)

    def listen(self) -> None:
        """Keep USR1 and TERM pending from now on. Call before the process has a second thread."""
        for number in _BY_SIGNAL:
            signal.signal(number, self._note)
            signal.siginterrupt(number, False)
        signal.pthread_sigmask(signal.SIG_BLOCK, _BY_SIGNAL)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, _BY_SIGNAL)
        self._listens = True

    def look(self, save_seconds: float | None, step_seconds: float) -> Stop:
        """The request so far, the clock included.

        Args:
            save_seconds: the longest save measured; None when there was none.
            step_seconds: the longest recent step.
        """
        if self._listens:
            signal.pthread_sigmask(signal.SIG_BLOCK, _BY_SIGNAL)
            pending = [_BY_SIGNAL[n] for n in _BY_SIGNAL if n in signal.sigpending()]
            self.asked = max([self.asked, *pending])
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
