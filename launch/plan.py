"""`mvl plan`: what a submit would run, checked, before anything runs.

Every stage is loaded and checked; the problems of all stages are printed together and nothing else
is. Otherwise a table says what each stage trains, for how long, on what layout, and how many
parameters learn, others what each takes over and the memory of its ranks. For a site on a cluster
one says what its jobs ask for and how long they should take, and the scripts themselves can be
printed or written. No torch, but for --build-rank.
"""

import json
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import exit_codes
from launch.difference import Difference, compare
from launch.graph import Selection, select, stages_of, starts_from
from launch.plan_build import print_built
from launch.plan_contracts import Contract, contracts, print_contracts
from launch.plan_memory import GIB, RankMemory, print_memory, stage_memory, too_large
from launch.plan_nemo_run import nemo_run
from launch.plan_nodes import NodePlan, plan_nodes, print_nodes
from launch.plan_notes import not_read
from launch.plan_time import print_time, stop_problem
from launch.site import load_site
from launch.site_schema import Launcher, SiteConfig
from launch.slurm.forecast import JobPlan, plan_jobs, print_jobs
from launch.slurm.shape import Measured
from launch.submission import missing_data, open_recipe, outdated_data
from launch.tables import print_table
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.length import derivations
from megatron_vl.config.load import config_hash
from megatron_vl.config.recipe import Recipe
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
    derivations: list[str]
    """How its steps follow from what it says of its length."""


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
        derivations=[derivation.text() for derivation in derivations(config).values()],
    )


@dataclass(frozen=True)
class Plan:
    """Everything `mvl plan` knows of the selected stages."""

    configs: list[StageConfig]
    stages: list[StagePlan]
    contracts: list[Contract]
    memory: list[RankMemory]
    nodes: list[NodePlan]
    jobs: list[JobPlan]
    problems: list[str]
    missing_data: list[str]


def make_plan(recipe: Recipe, selection: Selection, site: SiteConfig, run: RunFolder) -> Plan:
    """The plan of a recipe's selected stages on a site. Raises ConfigError."""
    chosen = select(recipe.graph, selection)
    configs = stages_of(recipe, chosen)
    before = starts_from(recipe, selection.skip)
    handed, problems = contracts(recipe, before, chosen)
    if site.nodes.gpu_gib:
        room = int(site.nodes.gpu_gib * GIB)
        problems += filter(None, (too_large(config, room) for config in configs))
    jobs: list[JobPlan] = []
    if site.launcher is Launcher.slurm:
        jobs = [job for job in plan_jobs(recipe, site, run) if job.stage in chosen]
        took = _measured(jobs)
        late = (stop_problem(config, site, took.get(config.name)) for config in configs)
        problems += filter(None, late)
    return Plan(
        configs=configs,
        stages=[
            plan_stage(path, config, before[name])
            for name, path, config in recipe.stages
            if name in chosen
        ],
        contracts=handed,
        memory=[row for config in configs for row in stage_memory(config)],
        nodes=plan_nodes(recipe, chosen),
        jobs=jobs,
        problems=problems,
        missing_data=missing_data(configs),
    )


def main(args: Namespace) -> int:
    """Print the plan of the selected stages, or what else was asked about them."""
    site = load_site(args.site)
    selection = Selection(args.first, args.last, tuple(args.skip))
    folder, recipe, selection = open_recipe(Path(args.recipe), selection, args.overrides)
    if args.build_rank is not None:
        configs = stages_of(recipe, select(recipe.graph, selection))
        agree = print_built(configs, args.build_rank, as_json=args.json)
        return exit_codes.OK if agree else exit_codes.FOUND
    about_scripts = args.scripts or args.out or args.run or args.format != "table"
    if site.launcher is not Launcher.slurm and about_scripts:
        raise ConfigError(
            f"--run, --scripts, --out and --format are about job scripts, and --site {args.site} "
            "has none; try --site loopback"
        )
    run = RunFolder(args.diff or args.run or Path("runs") / folder.resolve().name)
    plan = make_plan(recipe, selection, site, run)
    if args.diff:
        scripts = {job.stage: job.script for job in plan.jobs}
        found = compare(run, folder, recipe, selection, args.site, args.overrides, scripts)
        print_differences(found, as_json=args.json)
        return exit_codes.OK
    if args.format == "nemo-run":
        text = nemo_run(
            plan.jobs, recipe, site, run=run.path, source=str(folder), site_name=args.site,
            selection=(selection.first, selection.last, selection.skip),
            overrides=args.overrides,
        )  # fmt: skip
        print(text, end="")
        return exit_codes.OK
    if args.json:
        rows = ("stages", "contracts", "memory", "nodes", "jobs")
        plain = {name: [asdict(row) for row in getattr(plan, name)] for name in rows}
        print(json.dumps(plain | {"problems": plan.problems, "missing_data": plan.missing_data}))
    else:
        _print_all(args, recipe, plan, site)
    return exit_codes.FOUND if plan.problems else exit_codes.OK


def _print_all(args: Namespace, recipe: Recipe, plan: Plan, site: SiteConfig) -> None:
    """The tables, then what is not read, wrong or missing, then the scripts."""
    if plan.stages:
        _print(args.recipe, plan.stages)
        print_contracts(plan.contracts)
        print_memory(plan.memory)
    if plan.nodes:
        print_nodes(plan.nodes)
    if plan.jobs:
        print_jobs(plan.jobs, site)
        print_time(plan.configs, site, _measured(plan.jobs))
    names = [config.name for config in plan.configs]
    for note in not_read(recipe, names, site):
        print(f"not read: {note}")
    for problem in plan.problems:
        print(f"problem: {problem}")
    for problem in [*plan.missing_data, *outdated_data(args.recipe, plan.configs)]:
        print(f"before a submit: {problem}")
    if plan.missing_data:
        made_here = any(config.data.builder != "none" for config in plan.configs)
        print(
            f"to make it: mvl data prepare {args.recipe}"
            if made_here
            else "to bring it: mvl data convert --help"
        )
    _show_scripts(plan.jobs, args)


def _measured(jobs: Sequence[JobPlan]) -> dict[str, Measured | None]:
    return {job.stage: job.took for job in jobs}


def print_differences(found: Sequence[Difference], *, as_json: bool) -> None:
    """What a submission would change, or that it would change nothing."""
    if as_json:
        print(json.dumps([asdict(difference) for difference in found]))
        return
    for difference in found:
        print(difference.text())
    if not found:
        print("nothing would change")


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
    for plan in plans:
        for text in plan.derivations:
            print(f"{plan.stage}: {text}")
    total = short_count(sum(plan.tokens for plan in plans))
    print(f"{total} tokens in all, padding included; every rule between keys holds")


def short_count(value: int) -> str:
    """A count with three digits and a unit, such as 1.23 M."""
    for unit, size in ((" T", 10**12), (" B", 10**9), (" M", 10**6), (" K", 10**3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return str(value)
