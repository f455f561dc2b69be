"""One supervisor a run: a lock on `supervisor.lock` that the kernel drops with its holder.

The file holds the holder's process id and host, for messages and for `mvl cancel`. The lock belongs
to the open file, so a detached supervisor inherits it from the `submit` that started it, and no
other submit can slip in between.
"""

import fcntl
import os
import socket
import time
from pathlib import Path

from megatron_vl.run.folder import RunFolder

LOCK_NAME = "supervisor.lock"
_PATIENCE_SECONDS = 0.3  # a `mvl status` looking at the lock holds it for a moment


class BusyError(RuntimeError):
    """Another process runs this run."""


class RunLock:
    """The lock of one run, held by an open file."""

    def __init__(self, handle: int) -> None:
        self.handle = handle

    @classmethod
    def take(cls, run: RunFolder) -> "RunLock":
        """Take the lock. Raises BusyError when another process holds it."""
        run.path.mkdir(parents=True, exist_ok=True)
        handle = os.open(_path(run), os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while not _try_lock(handle, fcntl.LOCK_EX):
            if time.monotonic() > deadline:
                os.close(handle)
                pid, host = _read(run)
                raise BusyError(
                    f"{run.path} is being run by process {pid} on {host}; wait for it "
                    f"(mvl status {run.path}), stop it (mvl cancel {run.path}), or choose another "
                    "--run"
                )
            time.sleep(0.05)
        lock = cls(handle)
        lock.sign()
        return lock

    def sign(self) -> None:
        """Write this process's id and host into the lock file."""
        os.ftruncate(self.handle, 0)
        os.pwrite(self.handle, f"{os.getpid()}\n{socket.gethostname()}\n".encode(), 0)

    def release(self) -> None:
        """Give the lock up (ending the process does so too)."""
        os.close(self.handle)


def holder(run: RunFolder) -> tuple[int, str] | None:
    """Process id and host of who runs this run now; None when nobody does."""
    try:
        handle = os.open(_path(run), os.O_RDWR)
    except OSError:
        return None
    free = _try_lock(handle, fcntl.LOCK_SH)
    os.close(handle)
    return None if free else _read(run)


def _path(run: RunFolder) -> Path:
    return run.path / LOCK_NAME


def _try_lock(handle: int, kind: int) -> bool:
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(run: RunFolder) -> tuple[int, str]:
    words = _path(run).read_text().split()
    return (int(words[0]), words[1]) if len(words) == 2 else (0, "an unknown host")
