"""Runs the selected stages of a run one after another, each on its parents' receipts.

This is the supervisor: in the foreground under `mvl submit --follow`, else a detached process that
outlives the terminal. It reads the run folder alone. A stage is over when a receipt says so: if the
ranks ended without one, the supervisor writes it (failed, or incomplete when a person stopped it).

Refuses: to start a stage whose parent is not done or whose parent's checkpoint has changed, and to
go on past a stage that is not done.
"""

import dataclasses
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from launch import exit_codes
from launch.attempt import begin_attempt, counts, statement, write_own_receipt
from launch.follow import Watcher, make_watcher
from launch.gates import PAGE, settle_gate
from launch.local import GRACE_SECONDS, CommandBuilder, RankGroup, RankResult, rank_commands
from launch.lock import RunLock, holder
from launch.nodes.errors import CERTIFICATE_FAILED
from launch.reasons import why
from launch.summary import print_summary
from launch.way_on import resume, submit_again
from megatron_vl.config.recipe import TRAIN, load_work
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import Work
from megatron_vl.run.folder import (
    ParentError,
    RunError,
    RunFolder,
    StageFolder,
)
from megatron_vl.run.receipt import Receipt, now


class Cancelled(KeyboardInterrupt):
    """The supervisor was asked to stop (SIGTERM)."""


@dataclasses.dataclass(frozen=True)
class Supervisor:
    """Runs stages of one run, showing what happens through a watcher."""

    run: RunFolder
    watcher: Watcher
    build_commands: CommandBuilder = rank_commands
    grace_seconds: float = GRACE_SECONDS

    def run_selected(self) -> int:
        """Run the selected stages in order, each when all it waits for is done.

        What follows a stage that is not done is left out; other branches go on.

        Returns:
            An exit code: that of the first stage that is not done.
        """
        graph = self.run.graph()
        stuck: dict[str, int] = {}
        for name in self.run.plan()["selected"]:
            if any(parent in stuck for parent in graph.parents[name]):
                stuck[name] = exit_codes.HELD
                continue
            left_out = self.run.not_taken(name)
            if left_out is not None:
                self.watcher.say(f"{name}: {left_out}")
                continue
            receipt = self._bring_about(self.run.stage(name))
            if not receipt.done:
                self.watcher.say(f"{name}: {receipt.status}: {receipt.reason}")
                stuck[name] = exit_codes.BY_STATUS[receipt.status]
        return next(iter(stuck.values()), exit_codes.OK)

    def _bring_about(self, stage: StageFolder) -> Receipt:
        """The receipt of a stage: that of an earlier run where it counts, else of an attempt."""
        receipt = settle_gate(self.run, stage)
        if receipt is not None and receipt.held_by_gate:
            self.watcher.end(stage, receipt)
            return receipt
        if receipt is not None and counts(self.run, stage):
            self._refuse_stale(stage, receipt)
            self.watcher.end(stage, receipt)
            self.watcher.say(f"{stage.name}: done before{_at_step(receipt)}; not run again")
            return receipt
        receipt = self.run_stage(stage)
        if receipt.done:
            receipt = settle_gate(self.run, stage) or receipt
        if receipt.done:
            self.watcher.say(f"{stage.name}: done{_at_step(receipt)}{_left(receipt)}")
        return receipt

    def run_stage(self, stage: StageFolder) -> Receipt:
        """Make one attempt at one stage. Raises ParentError when it must not start."""
        config = load_work(stage.work_path)
        attempt = begin_attempt(self.run, stage, config)
        commands = self.build_commands(self.run, stage, config, attempt)
        self.watcher.say(_opening(stage, config, attempt, len(commands)))
        self.watcher.begin(stage, attempt)
        started, clock = now(), time.monotonic()
        result: RankResult | None = None
        trouble: BaseException | None = None
        try:
            with RankGroup(commands, self.grace_seconds) as group:
                self.run.journal.append(
                    "started",
                    stage=stage.name,
                    attempt=attempt,
                    ranks=len(commands),
                    pids=group.pids,
                )
                try:
                    result = group.wait(lambda: self.watcher.tick(stage))
                except KeyboardInterrupt:
                    self.watcher.say(f"{stage.name}: stopping its ranks; Ctrl-C again to be quick")
                    raise
        except BaseException as error:
            trouble = error
            if isinstance(error, KeyboardInterrupt):
                self.run.journal.append("signalled", stage=stage.name, attempt=attempt)
            raise
        finally:
            receipt = stage.receipt()
            if receipt is None:
                status, reason = why(stage, attempt, result, trouble)
                lost = time.monotonic() - clock
                receipt = write_own_receipt(
                    self.run, stage, config, status, reason, started=started, lost=lost
                )
            self.run.journal.append(
                "ended",
                stage=stage.name,
                attempt=attempt,
                status=receipt.status,
                step=receipt.step,
                statement=statement(receipt),
            )
            self.watcher.end(stage, receipt)
        return receipt

    def _refuse_stale(self, stage: StageFolder, receipt: Receipt) -> None:
        """A done stage counts only while its parent is the one it started from."""
        parent = self.run.parent(stage)
        before = parent.receipt() if parent else None
        if receipt.parent is None or before is None or before.checkpoint is None:
            return
        if (
            receipt.parent.stage == before.stage
            and receipt.parent.digest != before.checkpoint.digest
        ):
            raise ParentError(
                f"{stage.name} is done, but {before.stage} was trained again since; choose another "
                f"--run, or remove {stage.path} to train {stage.name} from the new {before.stage}"
            )


def start(run: RunFolder, grace_seconds: float, lock: RunLock, *, follow: bool) -> int:
    """Run what the plan selects: here, or in a process that outlives the terminal."""
    if follow:
        return supervise(run, grace_seconds)
    log = run.path / "supervisor.log"
    command = [sys.executable, "-m", "launch.cli", "supervise", str(run.path)]
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*command, "--grace", str(grace_seconds), "--lock", str(lock.handle)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock.handle],
        )
    quoted = shlex.quote(str(run.path))
    print(f"running in the background as process {process.pid}; its log is {log}")
    print(f"watch: mvl status {quoted}    stop: mvl cancel {quoted}")
    return exit_codes.OK


def supervise_detached(args: Namespace) -> int:
    """The hidden command behind a submit without --follow."""
    RunLock(args.lock).sign()
    return supervise(RunFolder(args.run), args.grace)


def supervise(run: RunFolder, grace_seconds: float) -> int:
    """Run the plan's selected stages with progress on the terminal or in the log."""
    selected = run.plan()["selected"]
    try:
        with _signals_raise(), make_watcher(run) as watcher:
            supervisor = Supervisor(run, watcher, grace_seconds=grace_seconds)
            code = supervisor.run_selected()
    except KeyboardInterrupt:
        print_summary(run, selected)
        _print_way_on(run)
        raise
    print_summary(run, selected)
    if code == exit_codes.OK:
        print(f"a page about it: mvl report {shlex.quote(str(run.path))}", flush=True)
    else:
        _print_way_on(run)
    return code


def _print_way_on(run: RunFolder) -> None:
    """Where to look and how to go on after a chain has stopped."""
    for stage in run.stages():
        receipt = stage.receipt()
        if receipt is not None and receipt.held_by_gate:
            words = ["mvl", "gate", "override", str(run.path), stage.name, "--reason", "WHY"]
            print(f"why, and what to try: {stage.attempt_path(receipt.attempts) / PAGE}")
            print(f"to go on all the same, on record: {shlex.join(words)}")
            return
        if receipt is not None and not receipt.done:
            print(f"its log: mvl logs {shlex.quote(str(run.path))} {stage.name}")
            if CERTIFICATE_FAILED in receipt.reason:
                print(f"to go on after a change of the recipe: {submit_again(run)}")
            else:
                print(f"to go on from its last checkpoint: {resume(run)}")
            return


def stop(run: RunFolder) -> int:
    """Ask the supervisor of a run to stop, and wait until it has."""
    found = holder(run)
    if found is None:
        print(f"{run.path}: nothing is running")
        return exit_codes.OK
    pid, host = found
    if host != platform.node():
        raise RunError(f"{run.path} is being run on {host} (process {pid}); cancel it there")
    os.kill(pid, signal.SIGTERM)
    print(f"{run.path}: asked process {pid} to stop", flush=True)
    while holder(run) == found:
        time.sleep(0.2)
    print(f"{run.path}: stopped")
    return exit_codes.OK


def _opening(stage: StageFolder, work: Work, attempt: int, num_ranks: int) -> str:
    """The line that opens an attempt."""
    if not isinstance(work, StageConfig):
        return f"{stage.name}: attempt {attempt}, {work.node.name}"
    parts = ", ".join(part.name for part in work.train.trainable)
    ranks = "1 rank" if num_ranks == 1 else f"{num_ranks} ranks"
    return f"{stage.name}: attempt {attempt}, {work.train.steps} steps on {ranks}, trains {parts}"


def _at_step(receipt: Receipt) -> str:
    """Where a stage ended, for a line about it; nothing for a node, which takes no steps."""
    return f", at step {receipt.step}" if receipt.kind == TRAIN else ""


def _left(receipt: Receipt) -> str:
    """What a stage or node has left, for a line about it."""
    if receipt.checkpoint is not None:
        return f", checkpoint {receipt.checkpoint.path} ({receipt.checkpoint.digest[:12]})"
    return f", {', '.join(receipt.outputs)}" if receipt.outputs else ""


@contextmanager
def _signals_raise() -> Iterator[None]:
    """While inside, SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that ranks are stopped.

    A SIGHUP that the caller has already set to be ignored (nohup) stays ignored.
    """

    def handler(number: int, frame: FrameType | None) -> None:
        raise Cancelled

    wanted = [signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        wanted.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in wanted}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
