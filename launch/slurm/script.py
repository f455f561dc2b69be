"""The script of a stage's job: a pure function of stage, site and run folder.

A person can read it, change it and submit it by hand. `slurm/job.sh.jinja` is its text. In the body
every name and value is quoted for the shell. In the header only options stand whose characters are
known: Slurm versions read quotes there differently, so a run folder or stage name that a header
cannot carry is refused. No secret is in it: values of exported variables travel beside it.

Refuses: line ends, other control characters and backslashes in a run folder's or a stage's name,
commas and colons in a folder that a container is to show.
"""

import functools
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from launch import exit_codes
from launch.site_schema import Runtime, SiteConfig
from launch.slurm.queue import job_name, plain
from launch.slurm.shape import Shape
from megatron_vl.config.errors import ConfigError

TEMPLATE = Path(__file__).resolve().parents[2] / "slurm" / "job.sh.jinja"
_LAST_SECONDS = 15
"""Before the time limit, what the books need to write down that ranks did not stop, in seconds."""
_HEADER_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_./=:,@%+-")


@dataclass(frozen=True)
class Job:
    """What a script is about.

    Attributes:
        run: the run folder, absolute.
        stage, folder: the stage's name and the absolute path of its folder.
        config: its resolved configuration.
        code: folder of the snapshot of the code.
        workdir: where relative paths of the configuration start.
        python: the interpreter that submits.
        command: arguments of the interpreter for each rank.
    """

    run: Path
    stage: str
    folder: Path
    code: Path
    workdir: Path
    command: tuple[str, ...]
    python: str = sys.executable


def stage_job(
    run: Path,
    stage: str,
    folder: str,
    code: Path,
    workdir: Path,
    command: Sequence[str] | None = None,
) -> Job:
    """The job of one stage of a run.

    `command` is what each rank runs, as arguments of the interpreter; None is `mvl train`.
    """
    path = run.resolve()
    place = path / "stages" / folder
    train = ("-P", "-m", "launch.cli", "train", str(place / "config.yaml"), "--run", str(path))
    words = train if command is None else command
    return Job(path, stage, place, code, workdir, tuple(words))


def render(job: Job, site: SiteConfig, shape: Shape) -> str:
    """The script. Raises ConfigError for names that cannot reach the job unchanged."""
    _refuse(job, site)
    environment = site.environment
    python = environment.python or job.python
    return _template().render(
        title=f"{plain(job.stage)} of {plain(job.run.name)}",
        options=header(job, site, shape),
        setup=environment.setup,
        secrets=environment.file,
        variables=[
            ("PYTHONPATH", str(job.code)),
            ("PYTHONUNBUFFERED", "1"),
            *environment.set.items(),
        ],
        run=str(job.run),
        stage=job.stage,
        folder=str(job.folder),
        workdir=str(job.workdir),
        python=shlex.quote(python),
        books=shlex.join(_books(job, site)),
        srun=shlex.join(_ranks(job, site, shape)),
        doctor=_doctor(job, site, shape) if site.doctor.enabled else None,
        inside=shlex.join(_container(job, site)[1]),
        command=shlex.join(job.command),
        lead_seconds=shape.lead_seconds,
        last_seconds=_LAST_SECONDS,
        codes={"held": exit_codes.HELD, "incomplete": exit_codes.INCOMPLETE},
    )


@functools.cache
def _template() -> jinja2.Template:
    """The script's text, with `sh` as the filter that quotes for the shell."""
    engine = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
    )
    engine.filters["sh"] = shlex.quote
    return engine.get_template(TEMPLATE.name)


def header(job: Job, site: SiteConfig, shape: Shape) -> list[str]:
    """The options of the #SBATCH lines."""
    asked = site.job
    output = str(job.folder).replace("%", "%%") + "/slurm-%j.out"
    # With this, jobs of one stage never run side by side, whoever submits them.
    options = [f"--job-name={job_name(job.run, job.stage)}", "--dependency=singleton"]
    options += [f"--nodes={shape.nodes}", f"--ntasks-per-node={shape.tasks}"]
    options += [f"--gpus-per-node={shape.gpus}"] * bool(shape.gpus)
    options += [f"--time={site.time.limit_minutes}", f"--signal=B:USR1@{shape.lead_seconds}"]
    options += ["--requeue" if site.requeue.enabled else "--no-requeue", "--open-mode=append"]
    options += [f"--output={header_value(output)}"]
    names = ",".join(site.environment.export)
    options += [f"--export={names or 'NIL'}"]
    for key in ("partition", "account", "qos", "reservation", "constraint"):
        if value := getattr(asked, key):
            options.append(f"--{key}={header_value(value)}")
    options += [f"--exclude={','.join(asked.exclude)}"] * bool(asked.exclude)
    options += ["--exclusive"] * asked.exclusive
    options += [f"--mem={asked.memory}"] * bool(asked.memory)
    options += [f"--cpus-per-task={asked.cpus_per_task}"] * bool(asked.cpus_per_task)
    return options + asked.options


def header_value(text: str) -> str:
    """A value as a #SBATCH line carries it: in double quotes where it holds anything unusual."""
    if set(text) <= _HEADER_SAFE:
        return text
    return '"' + text.replace('"', '\\"') + '"'


def _container(job: Job, site: SiteConfig) -> tuple[list[str], list[str]]:
    """Options of srun, and words before the command, that put a step into the site's container.

    The run folder and the working directory are shown under their own paths.
    """
    container = site.container
    own = dict.fromkeys(f"{path}:{path}" for path in (job.run, job.workdir))
    mounts = ",".join([*container.mounts, *own])
    if container.runtime is Runtime.pyxis:
        options = [f"--container-image={container.image}", f"--container-mounts={mounts}"]
        return [*options, f"--container-workdir={job.workdir}", *container.options], []
    if container.runtime is Runtime.apptainer:
        words = ["apptainer", "exec", "--bind", mounts, "--pwd", str(job.workdir)]
        return [], [*words, *container.options, container.image]
    return [], []


def _ranks(job: Job, site: SiteConfig, shape: Shape) -> list[str]:
    """Options of the step that runs the ranks."""
    options, _ = _container(job, site)
    cores = [f"--cpus-per-task={site.job.cpus_per_task}"] * bool(site.job.cpus_per_task)
    return [
        f"--nodes={shape.nodes}", f"--ntasks={shape.nodes * shape.tasks}",
        f"--ntasks-per-node={shape.tasks}", "--export=ALL", "--kill-on-bad-exit=1", "--wait=0",
        f"--mpi={site.job.mpi}", *cores, *options,
    ]  # fmt: skip


def _doctor(job: Job, site: SiteConfig, shape: Shape) -> dict[str, str]:
    """The step that looks at the nodes: one task on each, or one for each rank."""
    asked, tasks = site.doctor, shape.tasks if site.doctor.all_reduce else 1
    options, _ = _container(job, site)
    # A sick node's task must not end the others', and a hanging one must end.
    step = [
        f"--nodes={shape.nodes}", f"--ntasks={shape.nodes * tasks}", f"--ntasks-per-node={tasks}",
        "--export=ALL", "--kill-on-bad-exit=0", "--wait=0", "--time=5", f"--mpi={site.job.mpi}",
        *options,
    ]  # fmt: skip
    words = [f"--gpus={shape.gpus}", f"--least-disk-gb={asked.least_disk_gb:g}"]
    words += ["--all-reduce", f"--least-gb-s={asked.least_gb_s:g}"] * asked.all_reduce
    return {
        "srun": shlex.join(step),
        "options": shlex.join(words),
        "tasks": str(shape.nodes * tasks),
    }


def _books(job: Job, site: SiteConfig) -> list[str]:
    """The words before the interpreter that keeps the books: nothing, or the container's."""
    options, words = _container(job, site)
    if not options:
        return words
    step = ["srun", "--overlap", "--nodes=1", "--ntasks=1", "--ntasks-per-node=1", "--export=ALL"]
    return [*step, f"--mpi={site.job.mpi}", *options]


def _refuse(job: Job, site: SiteConfig) -> None:
    """Names that would not reach the job unchanged. Raises ConfigError."""
    problems = []
    named = {"the run folder": str(job.run), "the stage": job.stage, "the folder": str(job.workdir)}
    for what, text in named.items():
        bad = sorted({char for char in text if not char.isprintable() or char == "\\"})
        if bad or not text.isprintable():
            problems.append(
                f"{what} {text!r} holds {', '.join(map(repr, bad))}, which a job's script cannot "
                f"carry; nearest valid: {''.join('_' if char in bad else char for char in text)!r}"
            )
        elif site.container.runtime is not Runtime.none and set(text) & {",", ":"}:
            problems.append(
                f"{what} {text!r} holds a comma or colon, which a container's mounts cannot carry"
            )
    if not job.run.is_absolute():
        problems.append(f"{job.run}: a script needs the absolute path of its run")
    try:
        os.fsencode(str(job.folder)).decode("utf-8")
    except UnicodeError:
        problems.append(f"{str(job.folder)!r} is not UTF-8, which a script is written in")
    if problems:
        raise ConfigError(problems)
