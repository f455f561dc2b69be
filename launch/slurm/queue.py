"""Slurm's commands, and the jobs of a run in its queue.

Output is read as `-o` text, never as JSON, whose shape changes between releases. Jobs are found by
their names (`script.job_name`), which only one stage of one run folder has: an id from an old
journal may belong to another cluster's or another user's job by now.

Refuses nothing itself: a command that fails raises SlurmError with Slurm's own words and, where
they are known, what to change.
"""

import hashlib
import re
import shlex
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.slurm.hints import explain_refusal
from megatron_vl.run.folder import RunError, RunFolder

HINT = "\nwhat to change: "
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]+")
_SECONDS = 60.0
_COMPLETING_SECONDS = 60.0
_ENDED = (
    "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL",
    "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
)  # fmt: skip
_STARTED = ("no longer pending", "already finished")
_HELD = ("JobHeldUser", "launch failed requeued held", "job requeued in held state")
_HINTS = (
    ("invalid partition", "set job.partition of the site; `sinfo` lists the partitions"),
    ("account", "set job.account of the site; `sacctmgr show assoc user=$USER` lists yours"),
    ("time limit", "lower time.limit_minutes of the site; `sinfo -o '%P %l'` lists the limits"),
    ("qos", "set job.qos of the site; `sacctmgr show qos` lists them"),
    ("node configuration", "lower nodes.tasks, nodes.gpus or job.memory of the site, or the ranks"),
    ("node count", "lower the layout's ranks; `sinfo -o '%P %D'` lists how many nodes there are"),
    ("memory", "lower job.memory of the site"),
    ("feature", "set job.constraint of the site; `sinfo -o '%P %f'` lists the features"),
    ("unable to contact", "look whether the controller runs: `scontrol ping`"),
    (
        "configuration source",
        "no slurm.conf here: use a login node of the cluster, or name it in SLURM_CONF",
    ),
    ("socket timed out", "the controller is busy; submit again, which is safe"),
)


class SlurmError(RunError):
    """A Slurm command failed; the message holds its words and the nearest known cause."""


@dataclass(frozen=True)
class QueuedJob:
    """One job as squeue lists it."""

    id: str
    name: str
    state: str
    reason: str
    """Why it waits, in Slurm's words."""
    left: str
    """Wall time left."""
    starts: str
    """When it is expected to start; empty when unknown."""

    @property
    def live(self) -> bool:
        """Whether it may still run."""
        return self.state not in _ENDED

    @property
    def held(self) -> bool:
        """Whether it waits for a person to release it: it was sent held, or a controller that came
        back after a crash found its start unfinished."""
        return self.pending and self.reason in _HELD

    @property
    def held_by_administrator(self) -> bool:
        """Whether it waits for an administrator to release it; a user's release is refused."""
        return self.pending and self.reason == "JobHeldAdmin"

    @property
    def pending(self) -> bool:
        """Whether it waits."""
        return self.state == "PENDING"


def plain(text: str) -> str:
    """A name with everything unusual taken out, for where nothing else may stand."""
    return _UNSAFE.sub("_", text)[:40]


def job_name(run: Path, stage: str) -> str:
    """A job's name: readable from its left, and of this stage of this run folder alone."""
    path = run.resolve()
    tag = hashlib.sha256(f"{path}\n{stage}".encode(errors="surrogateescape")).hexdigest()[:10]
    return f"{plain(stage)}.{plain(path.name)}.{tag}"


def slurm_is_here() -> bool:
    """Whether this machine has Slurm's commands."""
    return shutil.which("sbatch") is not None and shutil.which("squeue") is not None


def command(*words: str, environment: dict[str, str] | None = None) -> str:
    """Run one of Slurm's commands; what it printed. Raises SlurmError."""
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=_SECONDS, env=environment
        )
    except FileNotFoundError:
        raise SlurmError(
            f"{words[0]} is not here: this needs a machine with Slurm's commands, such as the "
            "cluster's login node"
        ) from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{shlex.join(words)} gave no answer in {_SECONDS:.0f} s") from None
    if done.returncode != 0:
        said = (done.stderr or done.stdout).strip() or f"exit status {done.returncode}"
        raise SlurmError(f"{words[0]}: {said}{_hint(said)}")
    return done.stdout.strip()


def check_script(script: Path) -> None:
    """Ask Slurm whether it would take a script; nothing is queued. Raises SlurmError."""
    try:
        command("sbatch", "--test-only", str(script))
    except SlurmError as error:
        said, _, _ = str(error).partition(HINT)
        better = explain_refusal(said, script.read_text(encoding="utf-8"), command)
        raise SlurmError(f"{said}{HINT}{better}" if better else str(error)) from None


def submit_script(script: Path, *, after: str | None, hold: bool) -> str:
    """Queue a script and return its job's id.

    Args:
        after: id of the job that must end well before; None for none.
        hold: wait until `release`.
    """
    words = ["sbatch", "--parsable", *["--hold"] * hold]
    if after is not None:
        words.append(f"--dependency={dependency(after)}")
    return command(*words, str(script)).partition(";")[0]


def dependency(after: str | None) -> str:
    """What a stage's job waits for: its parent's job, and any other job of the same stage."""
    return "singleton" if after is None else f"afterok:{after},singleton"


def point_at(job: str, after: str | None) -> None:
    """Change what a pending job waits for; one that has started meanwhile waits for nothing."""
    try:
        command("scontrol", "update", f"jobid={job}", f"dependency={dependency(after)}")
    except SlurmError as error:
        if not any(words in str(error) for words in _STARTED):
            raise


def release(job: str) -> None:
    """Let a held job start."""
    command("scontrol", "release", job)


def cancel(jobs: Sequence[str]) -> None:
    """Cancel jobs: Slurm asks running ones to stop and ends them after its KillWait."""
    if jobs:
        command("scancel", *jobs)


def ask_to_stop(job: str) -> None:
    """Send SIGTERM to a running job's ranks, not to its script: they save and stop."""
    command("scancel", "--signal=TERM", job)


def find_jobs(names: Sequence[str]) -> list[QueuedJob]:
    """The jobs of these names that Slurm still knows, in the order they were submitted."""
    form = "%i|%j|%T|%r|%L|%S"
    text = command("squeue", "-h", "-t", "all", f"--name={','.join(names)}", "-o", form)
    jobs = []
    for line in text.splitlines():
        id, name, state, reason, left, starts = line.split("|")
        jobs.append(QueuedJob(id, name, state, reason, left, "" if starts == "N/A" else starts))
    return sorted(jobs, key=lambda job: int(job.id.partition("_")[0]))


def settled_jobs(names: Sequence[str]) -> list[QueuedJob]:
    """As `find_jobs`, after no job is between running and its next state any more."""
    deadline = time.monotonic() + _COMPLETING_SECONDS
    while True:
        jobs = find_jobs(names)
        if all(job.state != "COMPLETING" for job in jobs) or time.monotonic() > deadline:
            return jobs
        time.sleep(0.2)


def jobs_by_stage(run: RunFolder) -> dict[str, list[QueuedJob]]:
    """The jobs of each stage that Slurm still knows, oldest first."""
    stages = run.stages()
    names = {job_name(run.path, stage.name): stage.name for stage in stages}
    found: dict[str, list[QueuedJob]] = {stage.name: [] for stage in stages}
    for job in settled_jobs(list(names)):
        found[names[job.name]].append(job)
    return found


def live_job(jobs: Sequence[QueuedJob]) -> QueuedJob | None:
    """The job of a stage that may still run: the running one, else the newest that waits."""
    live = [job for job in jobs if job.live]
    return next((job for job in live if not job.pending), live[-1] if live else None)


def accounted(names: Sequence[str], since: str) -> dict[str, tuple[str, str]]:
    """Id and final state by name of jobs that only the accounting remembers; the latest of each.

    Empty where the cluster keeps no accounting.
    """
    base = ["-n", "-P", "-X", "-o", "JobName%200,JobID,State", f"--name={','.join(names)}"]
    try:
        text = command("sacct", "-S", since, *base)
    except SlurmError:
        return {}
    found = {}
    for line in text.splitlines():
        name, job, state = line.split("|")
        found[name] = (job, state.partition(" ")[0])
    return found


def _hint(said: str) -> str:
    lowered = said.lower()
    return next((f"{HINT}{hint}" for words, hint in _HINTS if words in lowered), "")
