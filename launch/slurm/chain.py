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

from launch.attempt import counts, needs_parent
from launch.gates import settle_gate
from launch.site import load_site
from launch.site_schema import SiteConfig
from launch.slurm import queue
from launch.slurm.forecast import script_of
from launch.slurm.hints import time_note
from launch.slurm.queue import QueuedJob, jobs_by_stage, live_job
from launch.snapshot import take_snapshot
from launch.submission import SITE_FILE
from megatron_vl.config.recipe import load_work
from megatron_vl.config.schema import StageConfig
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
    held: dict[str, str] = field(default_factory=dict)
    """Why a stage got no job: its gate holds, or one before it does."""
    notes: list[str] = field(default_factory=list)
    """What a person should know of the new jobs though Slurm takes them."""
    stuck: dict[str, str] = field(default_factory=dict)
    """Jobs in the queue that an administrator holds: no resume can release them."""


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

    A stage that a gate's verdict holds or has left out gets no job, nor does what comes after it.

    Args:
        command: what each rank of a training stage runs, where it is not `mvl train`.

    Raises RunError, ParentError, ConfigError or SlurmError; then nothing new has been released.
    """
    site = load_site(str(run.path / SITE_FILE))
    sent = Sent()
    todo = _to_send(run, selected, sent)
    code = take_snapshot(run)
    texts = {stage.name: _text(run, stage, site, code, command) for stage in todo}
    queued = jobs_by_stage(run)
    graph = run.graph()
    stale = [stage for stage in todo if _is_stale(stage, live_job(queued[stage.name]), texts)]
    preflight({stage.name: texts[stage.name] for stage in stale})
    notes = {time_note(texts[stage.name], queue.command) for stage in stale[:1]}
    sent.notes = sorted(notes - {""})  # one site, so all scripts ask for the same time
    replaced = []
    for stage in todo:
        after = _jobs_before(run, stage, queued, sent)
        job = live_job(queued[stage.name])
        if stage not in stale:
            assert job is not None
            if job.pending:
                queue.point_at(job.id, after)
            sent.kept[stage.name] = job.id
            if job.held_by_administrator:
                sent.stuck[stage.name] = job.id
            continue
        atomic.write_text(stage.path / SCRIPT, texts[stage.name])
        # What waits for a held job cannot start; everything else is held itself until all is sent.
        hold = not any(parent in sent.new for parent in graph.parents[stage.name])
        sent.new[stage.name] = queue.submit_script(stage.path / SCRIPT, after=after, hold=hold)
        run.journal.append("submitted", stage=stage.name, job=sent.new[stage.name], after=after)
        replaced += [job.id] if job is not None else []
    queue.cancel(replaced)
    _release(run)
    return sent


def _to_send(run: RunFolder, selected: Sequence[str], sent: Sent) -> list[StageFolder]:
    """The stages that want a job; the others are noted in `sent`."""
    graph = run.graph()
    todo = []
    for name in selected:
        stage = run.stage(name)
        receipt = settle_gate(run, stage)
        behind = [parent for parent in graph.parents[name] if parent in sent.held]
        left_out = run.not_taken(name)
        if receipt is not None and receipt.held_by_gate:
            sent.held[name] = receipt.reason
        elif counts(run, stage):
            sent.done.append(name)
        elif behind:
            sent.held[name] = f"waits for {', '.join(behind)}"
        elif left_out is not None:
            sent.held[name] = left_out
        else:
            todo.append(stage)
    return todo


def _text(
    run: RunFolder, stage: StageFolder, site: SiteConfig, code: Path, command: RankCommand | None
) -> str:
    work = load_work(stage.work_path)
    own = command is None or not isinstance(work, StageConfig)
    words = None if own or command is None else command(stage)
    return script_of(run, stage, work, site, code, words)


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


def _is_stale(stage: StageFolder, job: QueuedJob | None, texts: dict[str, str]) -> bool:
    """Whether a stage needs a new job: it has none, or one that waits with another script."""
    if job is None:
        return True
    path = stage.path / SCRIPT
    same = path.is_file() and path.read_text(encoding="utf-8") == texts[stage.name]
    return job.pending and not same


def _jobs_before(
    run: RunFolder, stage: StageFolder, queued: dict[str, list[QueuedJob]], sent: Sent
) -> str | None:
    """The jobs a stage's job waits for, as `afterok` takes them; None when all before is done.

    They are those of this submission or found in the queue by name; no id from a journal is used.
    Raises ParentError when the stage takes something over and nobody will make it.
    """
    ours = sent.new | sent.kept
    jobs = []
    for parent in run.waits_for(stage):
        if counts(run, parent):
            continue
        live = live_job(queued[parent.name])
        job = ours.get(parent.name, live.id if live is not None else None)
        if job is not None:
            jobs.append(job)
        elif needs_parent(load_work(stage.work_path)):
            raise ParentError(
                f"{stage.name} needs {parent.name}, which is not done and has no job; start from "
                f"it: --from {parent.name}"
            )
    return ":".join(jobs) or None


def _release(run: RunFolder) -> None:
    """Let the chain start; every job of it is queued and in the journal by now."""
    for name, jobs in jobs_by_stage(run).items():
        for job in jobs:
            if job.held:
                queue.release(job.id)
                run.journal.append("released", stage=name, job=job.id)
