"""What a submission would send to Slurm: the job of every stage and the hours it should take.

Hours follow from the tokens a second that the site states for a GPU; saves and the warning before
the time limit from what the run has measured so far, where it has. Nothing here asks Slurm.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from launch.graph import folder_names
from launch.nodes import node_arguments
from launch.site_schema import SiteConfig
from launch.slurm.left_out import left_out
from launch.slurm.script import render, stage_job
from launch.slurm.shape import Measured, Shape, shape_of
from launch.snapshot import snapshot_folder
from launch.tables import print_table
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.recipe import TRAIN, Recipe, kind_of
from megatron_vl.config.schema_node import Work
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import read_metrics, step_lines


@dataclass(frozen=True)
class JobPlan:
    """One stage's job."""

    stage: str
    script: str
    shape: Shape
    measured: bool
    """Whether the warning's lead comes from saves of this run."""
    kind: str = TRAIN
    """`train`, or what the node does."""
    took: Measured | None = None
    """What earlier attempts took."""


def plan_jobs(recipe: Recipe, site: SiteConfig, run: RunFolder) -> list[JobPlan]:
    """The job of every stage and node, in order. Raises ConfigError with the problems of all."""
    code, workdir = snapshot_folder(run), Path.cwd()
    found: list[JobPlan] = []
    problems: list[str] = []
    folders = folder_names(recipe)
    for entry in recipe.entries:
        name = entry.name
        took = measured(run, StageFolder(run.path / "stages" / folders[name], name))
        try:
            shape = shape_of(entry.config, site, took)
            words = _words(run, name, entry.config)
            job = stage_job(run.path, name, folders[name], code, workdir, words)
            script = render(job, site, shape)
            found.append(JobPlan(name, script, shape, took is not None, entry.kind, took))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return found


def script_of(
    run: RunFolder,
    stage: StageFolder,
    work: Work,
    site: SiteConfig,
    code: Path,
    command: Sequence[str] | None = None,
) -> str:
    """The script of a stage of a run as it would be submitted now. Raises ConfigError."""
    workdir = Path(run.plan()["workdir"])
    words = command or _words(run, stage.name, work)
    job = stage_job(run.path, stage.name, stage.path.name, code, workdir, words)
    avoided = [*site.job.exclude, *left_out(run.journal.read())]
    site = replace(site, job=replace(site.job, exclude=list(dict.fromkeys(avoided))))
    return render(job, site, shape_of(work, site, measured(run, stage)))


def _words(run: RunFolder, stage: str, work: Work) -> list[str] | None:
    """What a node's process runs; None for the ranks of a training stage."""
    return None if kind_of(work) == TRAIN else ["-P", *node_arguments(run.path.resolve(), stage)]


def measured(run: RunFolder, stage: StageFolder) -> Measured | None:
    """What earlier attempts at a stage took; None before its first save."""
    saves = [
        event["seconds"]
        for event in run.journal.read()
        if event["event"] == "saved" and event["stage"] == stage.name
    ]
    steps = [line["seconds"] for line in step_lines(read_metrics(stage.metrics_path))]
    return Measured(max(saves), max(steps)) if saves and steps else None


def print_jobs(jobs: Sequence[JobPlan], site: SiteConfig) -> None:
    """A table of the jobs, and what they add up to."""
    rows = [
        (
            job.stage,
            f"{job.shape.nodes:,}",
            f"{job.shape.tasks}",
            f"{job.shape.gpus}",
            f"{site.time.limit_minutes} min",
            f"{job.shape.lead_seconds} s" + "*" * job.measured,
            _hours(job.shape.work_hours),
            _hours(job.shape.wall_hours),
            str(job.shape.starts or "?"),
            _hours(job.shape.gpu_hours),
        )
        for job in jobs
    ]
    names = ("job", "nodes", "ranks/node", "GPUs/node", "limit", "warning", "steps take")
    print_table("", (*names, "wall time", "starts", "GPU hours"), rows, left=1)
    if any(job.measured for job in jobs):
        print("* from the saves and steps this run has measured")
    unknown = [job.stage for job in jobs if job.shape.gpu_hours is None and job.kind == TRAIN]
    if unknown:
        print(f"hours are left out for {', '.join(unknown)}: the site states no tokens_per_s")
        return
    hours = sum(job.shape.gpu_hours or 0.0 for job in jobs)
    wall = sum(job.shape.wall_hours or 0.0 for job in jobs)
    per = "GPU" if site.nodes.gpus else "rank"
    print(f"{_hours(wall)} of wall time, {hours:,.1f} {per} hours, without waiting in the queue")


def _hours(hours: float | None) -> str:
    """A length of time for a table."""
    if hours is None:
        return "?"
    if hours < 1:
        return f"{hours * 60:.1f} min"
    return f"{hours:,.1f} h"
