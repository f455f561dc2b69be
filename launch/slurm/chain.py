"""A run's stages as a chain of jobs: submitted once, whole, and repaired where it broke.

`send` compares what is wanted with what the queue holds and does the difference, so submitting a
second time is safe and resuming is the same act. The first new job is held until every other one
is queued and journaled; then it is released. A job waits for its parent's job by `afterok`, but
that is for the queue alone: what starts a stage is its parent's receipt, which the job reads.

Refuses: to change the configuration of a stage whose job is running; a stage whose parent is
neither done nor in the chain; whatever `sbatch --test-only` refuses.
"""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from launch.attempt import needs_parent
from launch.site import load_site
from launch.slurm import queue
from launch.slurm.forecast import script_of
from launch.slurm.queue import QueuedJob, jobs_by_stage, live_job
from launch.snapshot import take_snapshot
from launch.submission import SITE_FILE
from megatron_vl.config.load import load_stage
from megatron_vl.run import atomic
from megatron_vl.run.folder import ParentError, RunError, RunFolder, StageFolder

SCRIPT = "job.sh"
RankCommand = Callable[[StageFolder], Sequence[str]]
"""What each rank of a stage runs, as arguments of the interpreter."""


@dataclass
class Sent:
    """What `send` did, by stage: job ids; and the stages it left as they were."""

    new: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    done: list[str] = field(default_factory=list)


def refuse_running(run: RunFolder, changed: Sequence[str]) -> None:
    """Refuse a new configuration for stages whose jobs run now. Raises RunError."""
    for name, jobs in jobs_by_stage(run).items():
        job = live_job(jobs)
        if name in changed and job is not None and not job.pending:
            raise RunError(
                f"{name} runs as job {job.id} with another configuration; wait for it, or stop it "
                f"first: mvl cancel {run.path}"
            )


def send(run: RunFolder, selected: Sequence[str], command: RankCommand | None = None) -> Sent:
    """Bring the queue to what is wanted for these stages, in order.

    Args:
        command: what each rank of a stage runs, where it is not `mvl train`.

    Raises RunError, ParentError, ConfigError or SlurmError; then nothing new has been released.
    """
    site = load_site(str(run.path / SITE_FILE))
    stages = [run.stage(name) for name in selected]
    code = take_snapshot(run)
    texts = {
        stage.name: script_of(
            run,
            stage,
            load_stage(stage.config_path),
            site,
            code,
            None if command is None else command(stage),
        )
        for stage in stages
    }
    queued = jobs_by_stage(run)
    todo = [stage for stage in stages if not _is_done(stage)]
    stale = [stage for stage in todo if _is_stale(stage, live_job(queued[stage.name]), texts)]
    preflight({stage.name: texts[stage.name] for stage in stale})
    sent = Sent(done=[stage.name for stage in stages if _is_done(stage)])
    replaced = []
    for stage in todo:
        after = _job_before(run, stage, queued, sent)
        job = live_job(queued[stage.name])
        if stage not in stale:
            assert job is not None
            if job.pending:
                queue.point_at(job.id, after)
            sent.kept[stage.name] = job.id
            continue
        atomic.write_text(stage.path / SCRIPT, texts[stage.name])
        sent.new[stage.name] = queue.submit_script(
            stage.path / SCRIPT, after=after, hold=not sent.new
        )
        run.journal.append("submitted", stage=stage.name, job=sent.new[stage.name], after=after)
        replaced += [job.id] if job is not None else []
    queue.cancel(replaced)
    _release(run)
    return sent


def preflight(texts: dict[str, str]) -> None:
    """Ask Slurm about every script before the first is queued. Raises SlurmError."""
    with tempfile.TemporaryDirectory(prefix="mvl-preflight-") as folder:
        for name, text in texts.items():
            script = Path(folder) / SCRIPT
            script.write_text(text, encoding="utf-8")
            try:
                queue.check_script(script)
            except queue.SlurmError as error:
                raise queue.SlurmError(f"{name}: {error}") from None


def _is_done(stage: StageFolder) -> bool:
    receipt = stage.receipt()
    return receipt is not None and receipt.done


def _is_stale(stage: StageFolder, job: QueuedJob | None, texts: dict[str, str]) -> bool:
    """Whether a stage needs a new job: it has none, or one that waits with another script."""
    if job is None:
        return True
    path = stage.path / SCRIPT
    same = path.is_file() and path.read_text(encoding="utf-8") == texts[stage.name]
    return job.pending and not same


def _job_before(
    run: RunFolder, stage: StageFolder, queued: dict[str, list[QueuedJob]], sent: Sent
) -> str | None:
    """The job a stage waits for: its parent's, unless the parent is done.

    Raises ParentError when the stage takes something over and nobody will make it.
    """
    parent = run.parent(stage)
    if parent is None or _is_done(parent):
        return None
    ours = sent.new | sent.kept
    if parent.name in ours:
        return ours[parent.name]
    job = live_job(queued[parent.name])
    if job is not None:
        return job.id
    if needs_parent(load_stage(stage.config_path)):
        raise ParentError(
            f"{stage.name} needs {parent.name}, which is not done and has no job; start from it: "
            f"--from {parent.name}"
        )
    return None


def _release(run: RunFolder) -> None:
    """Let the chain start; every job of it is queued and in the journal by now."""
    for name, jobs in jobs_by_stage(run).items():
        for job in jobs:
            if job.live and job.reason == "JobHeldUser":
                queue.release(job.id)
                run.journal.append("released", stage=name, job=job.id)
