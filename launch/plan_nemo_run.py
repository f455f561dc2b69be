"""`mvl plan --format nemo-run`: the chain as one Python file for NVIDIA's nemo-run.

What: a script that prepares the run folder as `mvl submit` does and hands every stage and node to
nemo-run's Slurm executor, with the site's resources and container and the recipe's dependencies.
Why: for clusters and teams whose jobs all go through nemo-run. Receipts still decide: each job
opens an attempt, refuses a parent that is not done, and closes the attempt, in its first task.
What it refuses (ConfigError): apptainer, which nemo-run does not start, and an environment file.
What it costs: nothing here; the file needs `pip install nemo-run`, an optional extra.

Unlike jobs of `mvl submit`, those of nemo-run do not put themselves back into the queue: an
incomplete stage goes on when the file is run again.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path
from pprint import pformat
from string import Template

from launch.graph import folder_names
from launch.site_schema import Runtime, SiteConfig
from launch.slurm.forecast import JobPlan
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.recipe import Recipe

_FILE = Template('''\
"""A chain of stages for nemo-run; written by `mvl plan --format nemo-run`.

Run it where jobs are submitted, in the environment of the project with nemo-run beside it. Run it
again to go on: what is done stays done.
"""

import shlex
from pathlib import Path

import nemo_run as run

from launch.graph import Selection
from launch.snapshot import take_snapshot
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder

RUN = Path($run)
RECIPE = Path($recipe)
SITE = $site
OVERRIDES = $overrides
SELECTION = Selection($first, $last, $skip)
EXECUTOR = $executor
VARIABLES = $variables
MOUNTS = $mounts
JOBS = $jobs

RANK = r"""$rank"""


def executor(job):
    """Where one job runs."""
    return run.SlurmExecutor(
        **EXECUTOR,
        **job["shape"],
        container_mounts=MOUNTS,
        tunnel=run.LocalTunnel(job_dir=str(RUN / "nemo_run")),
        packager=run.Packager(),
    )


def script(job, code):
    """What each task of a job runs; values are quoted here, as nemo-run's own are not."""
    values = VARIABLES | job["variables"] | {"PYTHONPATH": str(code)}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items()]
    return "\\n".join(lines) + "\\n" + RANK


def main():
    """Prepare the run folder and hand the jobs over."""
    folder = RunFolder(RUN)
    prepare(RECIPE, folder, SELECTION, SITE, OVERRIDES)
    code = take_snapshot(folder)
    with run.Experiment(RUN.name) as experiment:
        sent = {}
        for name, job in JOBS.items():
            sent[name] = experiment.add(
                run.Script(inline=script(job, code)),
                executor=executor(job),
                name=name,
                dependencies=[sent[parent] for parent in job["after"]],
            )
        experiment.run(detach=True)


if __name__ == "__main__":
    main()
''')

_RANK = r"""
cd -- "$MVL_WORKDIR" || exit 2
# Task 0 keeps the books; the others wait for its word.
word_file="$MVL_FOLDER/nemo_run.$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}"
books() { "$MVL_PYTHON" -P -m launch.cli "$@"; }
if [ "$SLURM_PROCID" -eq 0 ]; then
    books job-begin "$MVL_RUN" "$MVL_STAGE" >"$word_file.part"
    mv -- "$word_file.part" "$word_file"
fi
for _ in $(seq 1800); do [ -e "$word_file" ] && break; sleep 1; done
read -r word attempt port <"$word_file" || exit 2
case $word in done) exit 0 ;; start) ;; *) exit 6 ;; esac
first=$("$MVL_PYTHON" -c 'import re, sys
names = sys.argv[1]
found = re.match(r"([^\[,]*)(?:\[(\d+))?", names)
print(found.group(1) + (found.group(2) or ""))' "$SLURM_JOB_NODELIST")
export MVL_WORLD=slurm MVL_ATTEMPT=$attempt MASTER_ADDR=$first MASTER_PORT=$port
export MVL_JOB_END=${SLURM_JOB_END_TIME:-$(($(date +%s) + MVL_LIMIT_SECONDS))}
eval "set -- $MVL_WORDS"
"$MVL_PYTHON" "$@" 2>&1 | tee -a "$MVL_FOLDER/attempts/$attempt/rank_$SLURM_PROCID.log"
code=${PIPESTATUS[0]}
if [ "$SLURM_PROCID" -eq 0 ]; then
    books job-end "$MVL_RUN" "$MVL_STAGE" "$attempt"
fi
exit "$code"
"""


def nemo_run(
    jobs: Sequence[JobPlan],
    recipe: Recipe,
    site: SiteConfig,
    *,
    run: Path,
    source: str,
    site_name: str,
    selection: tuple[str | None, str | None, tuple[str, ...]],
    overrides: Sequence[str] = (),
) -> str:
    """The text of the file. Raises ConfigError for a site that nemo-run cannot serve."""
    _refuse(site)
    folders = folder_names(recipe)
    names = [job.stage for job in jobs]
    graph = recipe.graph.without(selection[2])
    entries = {}
    for job in jobs:
        folder = run.resolve() / "stages" / folders[job.stage]
        words = ["-P", "-m", "launch.cli", "node", job.stage, "--run", str(run.resolve())]
        if job.kind == "train":
            train = ["train", str(folder / "config.yaml"), "--run", str(run.resolve())]
            words = ["-P", "-m", "launch.cli", *train]
        entries[job.stage] = {
            "after": [parent for parent in graph.parents[job.stage] if parent in names],
            "shape": {
                "nodes": job.shape.nodes,
                "ntasks_per_node": job.shape.tasks,
                "gpus_per_node": job.shape.gpus or None,
            },
            "variables": {
                "MVL_RUN": str(run.resolve()),
                "MVL_STAGE": job.stage,
                "MVL_FOLDER": str(folder),
                "MVL_LEAD_SECONDS": str(job.shape.lead_seconds),
                "MVL_WORDS": shlex.join(words),
            },
        }
    first, last, skip = selection
    here = Path.cwd()
    values = {
        "run": str(run.resolve()), "recipe": source, "site": site_name,
        "overrides": list(overrides), "first": first, "last": last, "skip": skip,
        "executor": _executor(site), "jobs": entries, "variables": _variables(site),
        "mounts": [*site.container.mounts, f"{run.resolve()}:{run.resolve()}", f"{here}:{here}"],
    }  # fmt: skip
    plain = {name: pformat(value, width=96, sort_dicts=False) for name, value in values.items()}
    return _FILE.substitute(plain, rank=_RANK)


def _executor(site: SiteConfig) -> dict[str, object]:
    """What all jobs ask for, as keywords of nemo-run's SlurmExecutor."""
    job, container = site.job, site.container
    hours, minutes = divmod(site.time.limit_minutes, 60)
    more = {"qos": job.qos, "reservation": job.reservation, "constraint": job.constraint}
    more["exclude"] = ",".join(job.exclude)
    values: dict[str, object] = {
        "account": job.account or None,
        "partition": job.partition or None,
        "time": f"{hours:02d}:{minutes:02d}:00",
        "exclusive": job.exclusive,
        "mem": job.memory or None,
        "cpus_per_task": job.cpus_per_task or None,
        "dependency_type": "afterany",
        "additional_parameters": {key: value for key, value in more.items() if value},
        "srun_args": [f"--mpi={job.mpi}", *container.options],
    }
    if container.runtime is Runtime.pyxis:
        values["container_image"] = container.image
    return values


def _variables(site: SiteConfig) -> dict[str, str]:
    """The variables of every job."""
    return {
        "PYTHONUNBUFFERED": "1",
        **site.environment.set,
        "MVL_PYTHON": site.environment.python or "python3",
        "MVL_LIMIT_SECONDS": str(60 * site.time.limit_minutes),
        "MVL_WORKDIR": str(Path.cwd()),
    }


def _refuse(site: SiteConfig) -> None:
    problems = []
    if site.container.runtime is Runtime.apptainer:
        problems.append("container.runtime is apptainer, which nemo-run's Slurm executor lacks")
    if site.environment.file:
        problems.append("environment.file is read by the project's own job script alone")
    if site.environment.setup:
        problems.append("environment.setup is run by the project's own job script alone")
    if problems:
        found = [f"--format nemo-run: {text}; use `mvl submit` there" for text in problems]
        raise ConfigError(found)
