"""`mvl logs`: what the ranks of a stage printed."""

import sys
import time
from argparse import Namespace
from pathlib import Path

from launch import exit_codes
from launch.follow import Tail
from launch.lock import holder
from megatron_vl.run.folder import RunError, RunFolder, StageFolder

_TICK_SECONDS = 0.3


def log_path(stage: StageFolder, number: int, rank: int) -> Path:
    """The log of one rank of one attempt. Raises RunError when there is none."""
    if number == 0:
        raise RunError(f"{stage.path}: {stage.name} has made no attempt yet")
    path = stage.attempt_path(number) / f"rank_{rank}.log"
    if not path.exists():
        attempts = ", ".join(str(n) for n in range(1, stage.last_attempt() + 1))
        ranks = len(list(stage.attempt_path(number).glob("rank_*.log")))
        raise RunError(
            f"{path}: no such log; {stage.name} has the attempts {attempts or 'none'}, and attempt "
            f"{number} has {ranks} rank(s), counted from 0"
        )
    return path


def main(args: Namespace) -> int:
    """Print a log; with -f what is added to it, over all attempts, until the run ends."""
    run = RunFolder(args.run)
    stage = run.stage(args.stage)
    attempt = args.attempt or _first_attempt(run, stage, follow=args.follow)
    tail = Tail(log_path(stage, attempt, args.rank))
    still = _Alive(run)
    while True:
        alive = args.follow and still()
        for line in tail.lines():
            print(line)
        sys.stdout.flush()
        newer = stage.last_attempt()
        if args.follow and args.attempt is None and newer > attempt:
            path = stage.attempt_path(newer) / f"rank_{args.rank}.log"
            if path.exists():
                attempt, tail = newer, Tail(path)
                print(f"--- attempt {attempt} ---")
                continue
        elif not alive:
            return exit_codes.OK
        time.sleep(_TICK_SECONDS)


def _first_attempt(run: RunFolder, stage: StageFolder, *, follow: bool) -> int:
    """The attempt to begin with: the latest; with -f, wait for the first while the run goes on."""
    still = _Alive(run)
    while follow and not any(stage.path.glob("attempts/*/rank_0.log")) and still():
        time.sleep(_TICK_SECONDS)
    return stage.last_attempt()


class _Alive:
    """Whether anybody runs a run; asks a cluster's queue no more often than every few seconds."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run
        self._on_cluster = run.plan().get("launcher") == "slurm"
        self._next = 0.0
        self._last = True

    def __call__(self) -> bool:
        if not self._on_cluster:
            return holder(self._run) is not None
        if time.monotonic() > self._next:
            from launch.slurm.watch import POLL_SECONDS, alive

            self._next = time.monotonic() + POLL_SECONDS
            self._last = alive(self._run)
        return self._last
