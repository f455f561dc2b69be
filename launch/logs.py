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


def log_path(stage: StageFolder, attempt: int | None, rank: int) -> Path:
    """The log of one rank of one attempt (None: the latest). Raises RunError when there is none."""
    number = stage.last_attempt() if attempt is None else attempt
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
    """Print a log, and with -f what is added to it until the run ends."""
    run = RunFolder(args.run)
    path = log_path(run.stage(args.stage), args.attempt, args.rank)
    tail = Tail(path)
    while True:
        alive = args.follow and holder(run) is not None
        for line in tail.lines():
            print(line)
        sys.stdout.flush()
        if not alive:
            return exit_codes.OK
        time.sleep(_TICK_SECONDS)
