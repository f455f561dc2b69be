"""`mvl plan`: what a submit would run, checked, before anything runs.

Every stage is loaded and checked; the problems of all stages are printed together and nothing else
is. Otherwise a table says what each stage trains, for how long, on what layout, and how many
parameters learn. For a site on a cluster a second one says what its jobs ask for and how long they
should take, and the scripts themselves can be printed or written.
"""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import exit_codes
from launch.site import load_site
from launch.site_schema import Launcher
from launch.slurm.forecast import JobPlan, plan_jobs, print_jobs
from launch.submission import Selection, missing_data, open_recipe, select
from launch.tables import print_table
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import Part, StageConfig, WeightSource
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do."""

    stage: str
    source: str
    trainable: list[str]
    carries: str
    starts_from: str
    """`carries` in words: the stage whose weights are taken, and what is drawn anew."""
    steps: int
    sequences: int
    sequence_length: int
    tokens: int
    """Positions trained on: steps times sequences times their length, padding included."""
    ranks: int
    layout: str
    """The axes that have more than one rank, such as `tensor 2, data 4`."""
    short_layout: str
    """The same as the field writes it, such as `TP2 DP4`."""
    parameters: int
    trainable_parameters: int
    config_hash: str


def plan_stage(source: Path, config: StageConfig, before: str | None) -> StagePlan:
    """The plan of one checked stage; `before` is the stage it follows, if any."""
    parallel, train, carry = config.parallel, config.train, config.carry
    sequences = train.steps * train.global_batch
    counted = model_parameters(config.model)
    axes = ("tensor", "pipeline", "context", "data")
    split = [f"{axis} {size}" for axis in axes if (size := getattr(parallel, axis)) > 1]
    short = [f"{axis[0].upper()}P{getattr(parallel, axis)}" for axis in axes]
    short = [word for word in short if not word.endswith("P1")] + ["SP"] * parallel.sequence
    split += ["sequence"] * parallel.sequence
    carried = [f"{carry.weights.name} weights"]
    carried += [f"fresh {part.name}" for part in carry.fresh]
    carried += ["optimizer"] * carry.optimizer + ["data cursor"] * carry.data_cursor
    previous = carry.weights is WeightSource.previous
    start = [before or "the stage before it" if previous else "random weights"]
    start += [f"fresh {part.name}" for part in carry.fresh]
    start += ["its optimizer"] * carry.optimizer + ["its data cursor"] * carry.data_cursor
    return StagePlan(
        stage=config.name,
        source=str(source),
        trainable=[part.name for part in train.trainable],
        carries=", ".join(carried),
        starts_from=", ".join(start),
        steps=train.steps,
        sequences=sequences,
        sequence_length=config.data.sequence_length,
        tokens=sequences * config.data.sequence_length,
        ranks=config.parallel.ranks,
        layout=", ".join(split),
        short_layout=" ".join(short) or "-",
        parameters=counted.total,
        trainable_parameters=counted.of_parts({part.value for part in train.trainable}),
        config_hash=config_hash(config),
    )


def main(args: Namespace) -> int:
    """Print the plan of the selected stages."""
    site = load_site(args.site)
    selection = Selection(args.first, args.last, tuple(args.skip))
    folder, stages, selection = open_recipe(Path(args.recipe), selection, args.overrides)
    names = [name for name, _, _ in stages]
    chosen = select(names, selection)
    kept = [name for name in names if name not in selection.skip]
    before = dict(zip(kept[1:], kept, strict=False))
    plans = [
        plan_stage(path, config, before.get(name))
        for name, path, config in stages
        if name in chosen
    ]
    jobs: list[JobPlan] = []
    if site.launcher is Launcher.slurm:
        run = RunFolder(args.run or Path("runs") / folder.resolve().name)
        jobs = [job for job in plan_jobs(stages, site, run) if job.stage in chosen]
    elif args.scripts or args.out or args.run:
        raise ConfigError(
            f"--run, --scripts and --out are about job scripts, and --site {args.site} has none; "
            "try --site loopback"
        )
    missing = missing_data([config for name, _, config in stages if name in chosen])
    if args.json:
        values = {"stages": [asdict(plan) for plan in plans], "missing_data": missing}
        print(json.dumps(values | {"jobs": [asdict(job) for job in jobs]}))
        return exit_codes.OK
    _print(args.recipe, plans)
    if jobs:
        print_jobs(jobs, site)
    for problem in missing:
        print(f"before a submit: {problem}")
    if missing:
        print(f"to make it: mvl data prepare {args.recipe}")
    _show_scripts(jobs, args)
    return exit_codes.OK


def _show_scripts(jobs: list[JobPlan], args: Namespace) -> None:
    """Print the scripts, or write them, as asked."""
    for job in jobs:
        if args.scripts:
            print(f"\n===== {job.stage} =====\n{job.script}", end="")
        if args.out:
            path = Path(args.out) / f"{job.stage}.sh"
            atomic.write_text(path, job.script)
            print(f"wrote {path}")


def _print(recipe: str, plans: list[StagePlan]) -> None:
    rows = [
        (
            plan.stage,
            plan.starts_from,
            "all" if len(plan.trainable) == len(Part) else " ".join(plan.trainable),
            plan.short_layout,
            f"{plan.ranks:,}",
            f"{plan.steps:,}",
            f"{plan.sequences:,} x {plan.sequence_length:,}",
            short_count(plan.tokens),
            f"{short_count(plan.trainable_parameters)} / {short_count(plan.parameters)}",
        )
        for plan in plans
    ]
    names = ("stage", "starts from", "trains", "layout", "ranks", "steps", "sequences")
    title = f"{recipe}: {len(plans)} {'stage' if len(plans) == 1 else 'stages'}"
    print_table(title, (*names, "tokens", "trained / all"), rows, left=4)
    total = short_count(sum(plan.tokens for plan in plans))
    print(f"{total} tokens in all, padding included; every rule between keys holds")


def short_count(value: int) -> str:
    """A count with three digits and a unit, such as 1.23 M."""
    for unit, size in ((" T", 10**12), (" B", 10**9), (" M", 10**6), (" K", 10**3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return str(value)
