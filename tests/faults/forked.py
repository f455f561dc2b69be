"""Launchers and ranks forked from one process that has imported everything.

A fresh `mvl` and its ranks spend seconds importing; here `mvl resume` starts in a few milliseconds,
and what runs is the real command: supervisor, lock, receipts, signals, trainer. Only the step from
a rank's command line to its process is replaced, by a fork that leads a session of its own, holds
no file of its parent, and has the environment and log that the command asks for.
"""

import contextlib
import ctypes
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

import launch.chain
import launch.cli
import launch.local
import launch.submit
import launch.train
import megatron_vl.train.main  # noqa: F401
from launch.local import RankCommand

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of Linux


class Forked:
    """A forked process, with what the supervisor uses of `subprocess.Popen`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def wait(self) -> int:
        code = self._wait(0)
        assert code is not None
        return code

    def _wait(self, options: int) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, options)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def become_template() -> None:
    """Make this process one to fork from: one thread, and orphans come back to it."""
    torch.set_num_threads(1)
    ctypes.CDLL(None).prctl(_SUBREAPER, 1)
    launch.local._start = _start_rank  # type: ignore[assignment]


def mvl(arguments: list[str], log: Path) -> Forked:
    """`mvl ARGUMENTS`, forked; what it prints is appended to `log`."""
    return fork(lambda: launch.cli.main(arguments), log, "ab")


def reap_orphans() -> None:
    """Take leave of processes whose launcher was killed and that have ended since."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _start_rank(command: RankCommand) -> Forked:
    command.log.parent.mkdir(parents=True, exist_ok=True)
    assert command.argv[1:3] == ["-m", "launch.cli"], command.argv

    def run() -> int:
        os.environ.update(command.env)
        return launch.cli.main(command.argv[3:])

    return fork(run, command.log, "wb")


def fork(run: Callable[[], int], log: Path, mode: str) -> Forked:
    """Run a function as a process of its own that ends with what it returns."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Forked(pid)
    code = 1
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_APPEND if mode == "ab" else os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, flags, 0o644), 1)
        os.dup2(1, 2)
        os.closerange(3, 256)  # the run's lock, and pipes to whoever watches
        code = run()
    except SystemExit as leaving:
        code = leaving.code if isinstance(leaving.code, int) else 1
        if isinstance(leaving.code, str):
            print(leaving.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
