"""Ranks as processes of this machine: started together, watched together, ended together.

Every rank is the leader of its own session, so that ending a rank ends its data workers with it.
When one rank dies the others wait for it in a collective forever; they are asked to stop (SIGTERM)
and soon killed. When the supervisor itself is interrupted they are asked the same and have a longer
grace: ranks that can save do, and exit with INCOMPLETE. A supervisor that is killed outright cannot
ask, so each rank also asks the kernel to be told (see `end_with_parent`). What a rank prints goes
to `rank_R.log` of the attempt; `log` is rank 0's.
"""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from launch import exit_codes
from launch.nodes import node_command
from launch.ports import free_port
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import Work
from megatron_vl.run.folder import RunFolder, StageFolder

GRACE_SECONDS = 30.0
_LAST_WORDS_SECONDS = 5.0  # for the ranks beside one that failed: they can print, not save
_ORDERLY = (exit_codes.OK, exit_codes.INCOMPLETE)
_TICK_SECONDS = 0.1
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux


@dataclass(frozen=True)
class RankCommand:
    """What one rank runs."""

    argv: list[str]
    env: dict[str, str]
    """Set on top of this process's environment."""
    log: Path


@dataclass(frozen=True)
class RankResult:
    """How the ranks of one attempt ended."""

    codes: list[int]
    """Exit status by rank; negative is the number of the signal that ended it."""
    first_failed: int | None
    """The rank that ended wrongly before any other was stopped on its account; of several, one that
    a signal ended."""


CommandBuilder = Callable[[RunFolder, StageFolder, Work, int], list[RankCommand]]


def rank_commands(
    run: RunFolder, stage: StageFolder, work: Work, attempt: int
) -> list[RankCommand]:
    """The commands of one attempt: `mvl train CONFIG --run RUN` for every rank, or the node's."""
    if isinstance(work, StageConfig):
        ranks, threads = work.parallel.ranks, work.train.threads
        argv = [sys.executable, "-m", "launch.cli", "train", str(stage.config_path)]
        argv += ["--run", str(run.path)]
    else:
        ranks, threads, argv = 1, 0, node_command(run.path, stage.name)
    shared = rank_environment(ranks, threads) | {"MVL_ATTEMPT": str(attempt)}
    folder = stage.attempt_path(attempt)
    return [
        RankCommand(
            argv, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, folder / f"rank_{r}.log"
        )
        for r in range(ranks)
    ]


def rank_environment(ranks: int, threads: int) -> dict[str, str]:
    """What all ranks of a new world on this machine share; threads 0 divides the cores."""
    return {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "MVL_SUPERVISOR": str(os.getpid()),
        "OMP_NUM_THREADS": str(threads or max(1, _num_cores() // ranks)),
        "PYTHONUNBUFFERED": "1",
    }


class RankGroup:
    """The processes of one attempt. A context manager: leaving it leaves no process behind."""

    def __init__(self, commands: Sequence[RankCommand], grace_seconds: float = GRACE_SECONDS):
        self._commands = list(commands)
        self._grace_seconds = grace_seconds
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "RankGroup":
        try:
            for command in self._commands:
                self._processes.append(_start(command))
        except BaseException:
            self.stop()
            raise
        first = self._commands[0].log
        link = first.with_name("log")
        link.unlink(missing_ok=True)
        link.symlink_to(first.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pids(self) -> list[int]:
        """Process ids by rank."""
        return [process.pid for process in self._processes]

    def wait(self, on_tick: Callable[[], None] = lambda: None) -> RankResult:
        """Wait until all ranks have ended; as soon as one ends wrongly, stop the others.

        `on_tick` is called a few times a second, from this thread.
        """
        first_failed = None
        while True:
            codes = [process.poll() for process in self._processes]
            wrong = [rank for rank, code in enumerate(codes) if code not in (None, *_ORDERLY)]
            if wrong:
                first_failed = min(wrong, key=lambda rank: (codes[rank] or 0) > 0)
                self.stop(min(_LAST_WORDS_SECONDS, self._grace_seconds))
            if wrong or None not in codes:
                break
            on_tick()
            time.sleep(_TICK_SECONDS)
        on_tick()
        return RankResult([process.wait() for process in self._processes], first_failed)

    def stop(self, grace_seconds: float | None = None) -> None:
        """End every rank and its children: SIGTERM, then SIGKILL after the grace.

        An interrupt meanwhile (a second Ctrl-C) cuts the grace short and leaves no process either.
        """
        alive = [process for process in self._processes if process.poll() is None]
        grace = self._grace_seconds if grace_seconds is None else grace_seconds
        deadline = time.monotonic() + grace
        try:
            for process in alive:
                _signal_group(process.pid, signal.SIGTERM)
            while alive and time.monotonic() < deadline:
                time.sleep(_TICK_SECONDS / 2)
                alive = [process for process in alive if process.poll() is None]
        except KeyboardInterrupt:
            pass
        for process in self._processes:
            _signal_group(process.pid, signal.SIGKILL)  # workers that outlived their rank too
            process.wait()


def end_with_parent() -> None:
    """Have the kernel send this process SIGTERM when its supervisor dies. Linux; else nothing.

    Called by a rank as it starts. Covers the moment before the call: a rank whose supervisor is
    already gone ends at once.
    """
    supervisor = os.environ.get("MVL_SUPERVISOR")
    if supervisor is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)
    if os.getppid() != int(supervisor):
        sys.exit("the supervisor of this rank has gone away; ending")


def describe_end(code: int) -> str:
    """An exit status in words."""
    if code >= 0:
        return f"exited with status {code}"
    name = signal.Signals(-code).name
    by = "the kernel does so when memory runs out, a person with kill -9"
    hint = f" ({by})" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}"


def _start(command: RankCommand) -> "subprocess.Popen[bytes]":
    command.log.parent.mkdir(parents=True, exist_ok=True)
    with command.log.open("wb") as log:
        return subprocess.Popen(
            command.argv,
            env={**os.environ, **command.env},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
