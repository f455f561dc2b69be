"""Looking at a run's jobs, following them, stopping them. With `sacct` and without.

What a stage has come to is in its receipt; the queue says only why nothing is running yet. A
machine without Slurm's commands still shows everything that the run folder says.
"""

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass

from launch import exit_codes
from launch.follow import PlainWatcher
from launch.slurm import queue
from launch.slurm.queue import QueuedJob, SlurmError, job_name, jobs_by_stage, live_job
from launch.summary import print_summary
from megatron_vl.run.folder import RunFolder

POLL_SECONDS = 2.0
_ASK_AGAIN_SECONDS = 5.0
_PATIENCE_SECONDS = 900.0
_WAITS = {
    "None": "waits; Slurm has not looked at it yet",
    "Dependency": "waits for the stage before it",
    "DependencyNeverSatisfied": "the job it waits for did not end well; `mvl resume` goes on",
    "Priority": "waits for nodes: other jobs come first",
    "Resources": "waits for nodes to become free",
    "BeginTime": "Slurm starts it again in a moment",
    "JobHeldUser": "held in the queue; `mvl resume` releases it",
    "launch failed requeued held": "Slurm could not start it; `mvl resume` releases it",
    "JobHeldAdmin": "held by an administrator",
    "PartitionTimeLimit": "asks for more time than the partition gives: lower time.limit_minutes "
    "of the site and submit again (`sinfo -o '%P %l'`)",
    "PartitionNodeLimit": "asks for more nodes than the partition gives: lower the layout's ranks, "
    "or set job.partition of the site (`sinfo -o '%P %D'`)",
    "PartitionDown": "the partition is down: `sinfo`",
    "PartitionInactive": "the partition is not active: `sinfo`",
    "ReqNodeNotAvail": "nodes it needs are down, drained or reserved: `sinfo -R` says why",
    "Nodes required for job are DOWN": "nodes it needs are down or drained: `sinfo -R` says why",
    "AccountNotAllowed": "the partition does not take this account: set job.account of the site",
    "InvalidAccount": "the cluster does not know job.account of the site",
    "InvalidQOS": "the cluster does not know job.qos of the site",
    "QOS": "is at a limit of the QOS and starts when your other jobs leave room (`sacctmgr show "
    "qos`)",
    "Assoc": "is at a limit of the account and starts when its other jobs leave room (`sacctmgr "
    "show assoc user=$USER`)",
}
"""Why a job waits, by the beginning of Slurm's reason; the longest that fits counts."""


@dataclass(frozen=True)
class JobView:
    """What Slurm says of a stage."""

    job: str
    state: str
    live: bool
    running: bool
    note: str
    """Why it waits, or how its last job ended."""


def views(run: RunFolder) -> dict[str, JobView] | None:
    """What Slurm says of each stage it knows; None where Slurm cannot be asked."""
    if not queue.slurm_is_here():
        return None
    try:
        found = jobs_by_stage(run)
    except SlurmError:
        return None
    seen = {name: _view(jobs) for name, jobs in found.items() if jobs}
    forgotten = {
        job_name(run.path, stage.name): stage.name
        for stage in run.stages()
        if stage.name not in seen and stage.receipt() is None
    }
    if forgotten:
        accounted = queue.accounted(list(forgotten), run.plan()["created"][:19])
        for name, (job, state) in accounted.items():
            seen[forgotten[name]] = JobView(job, state, False, False, f"job {job} ended: {state}")
    return seen


def alive(run: RunFolder) -> bool:
    """Whether a job of the run may still run; False where Slurm cannot be asked."""
    return any(view.live for view in (views(run) or {}).values())


def cancel(run: RunFolder, *, at_once: bool) -> int:
    """Cancel waiting jobs, last first; have running ones save and stop, or end them `at_once`."""
    jobs = {name: live_job(found) for name, found in jobs_by_stage(run).items()}
    live = {name: job for name, job in jobs.items() if job is not None}
    if not live:
        print(f"{run.path}: nothing is running or waiting")
        return exit_codes.OK
    for name, job in live.items():
        run.journal.append("cancelled", stage=name, job=job.id)
    waiting = [job.id for job in reversed(live.values()) if job.pending]
    running = [job.id for job in live.values() if not job.pending]
    queue.cancel(waiting)
    if at_once:
        queue.cancel(running)
    elif running:
        print(f"asked job {', '.join(running)} to save and stop; at once: --now", flush=True)
    deadline, asked = time.monotonic() + _PATIENCE_SECONDS, 0.0
    while running and _still_live(run):
        if time.monotonic() > deadline:
            raise SlurmError(f"job {', '.join(running)} does not stop; to end it: mvl cancel --now")
        if not at_once and time.monotonic() - asked > _ASK_AGAIN_SECONDS:
            # Again, because a signal that comes before the ranks listen is lost.
            asked = time.monotonic()
            for number in running:
                queue.ask_to_stop(number)
        time.sleep(0.5)
    print(f"{run.path}: stopped")
    return exit_codes.OK


def follow(run: RunFolder, selected: Sequence[str]) -> int:
    """Show the jobs' progress until none is left; Ctrl-C leaves them to themselves."""
    try:
        with PlainWatcher(run) as watcher:
            _follow(run, watcher)
    except KeyboardInterrupt:
        quoted = shlex.quote(str(run.path))
        print(
            f"no longer watching; the jobs go on. Watch: mvl status {quoted} --watch    "
            f"stop them: mvl cancel {quoted}"
        )
        return exit_codes.OK
    print_summary(run, selected)
    for name in selected:
        receipt = run.stage(name).receipt()
        if receipt is None and run.not_taken(name) is not None:
            continue
        if receipt is None:
            return exit_codes.FAILED
        if not receipt.done:
            print(f"{name}: {receipt.status}: {receipt.reason}")
            return exit_codes.BY_STATUS[receipt.status]
    return exit_codes.OK


def _follow(run: RunFolder, watcher: PlainWatcher) -> None:
    shown: tuple[str, int] | None = None
    said: dict[str, str] = {}
    next_look = 0.0
    while True:
        if time.monotonic() > next_look:
            found = views(run) or {}
            next_look = time.monotonic() + POLL_SECONDS
            for name, view in found.items():
                # What a running job has left, or when one may start, changes at every look.
                news = view.state if view.running else view.note.partition("; expected")[0]
                if view.live and said.get(name) != news:
                    watcher.say(f"{name}: {view.note}")
                    said[name] = news
            running = next((name for name, view in found.items() if view.running), None)
            if running is not None:
                attempt = run.stage(running).last_attempt()
                if attempt and (running, attempt) != shown:
                    shown = (running, attempt)
                    watcher.begin(run.stage(running), attempt)
            if not any(view.live for view in found.values()):
                break
        if shown is not None:
            watcher.tick(run.stage(shown[0]))
        time.sleep(0.25)


def _still_live(run: RunFolder) -> bool:
    return any(live_job(jobs) is not None for jobs in jobs_by_stage(run).values())


def _why_it_waits(reason: str) -> str:
    """Slurm's reason in words that say what to do; its own name stays where it tells more."""
    known = max((name for name in _WAITS if reason.startswith(name)), key=len, default=None)
    if known is None:
        return f"waits: {reason}"
    return _WAITS[known] if known == reason else f"{_WAITS[known]} ({reason})"


def _view(jobs: Sequence[QueuedJob]) -> JobView:
    job = live_job(jobs) or jobs[-1]
    if not job.live:
        note = f"job {job.id} ended: {job.state}"
    elif job.pending:
        note = f"job {job.id} {_why_it_waits(job.reason)}"
        note += f"; expected to start {job.starts}" * bool(job.starts)
    else:
        note = f"job {job.id}, {job.left} left"
    return JobView(job.id, job.state, job.live, job.live and not job.pending, note)
