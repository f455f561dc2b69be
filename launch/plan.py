"""`mvl plan`: what a submit would run, checked, before anything runs.

Every stage is loaded and checked; the problems of all stages are printed together and nothing else
is. Otherwise a table says what each stage trains, for how long, on what layout, and how many
parameters learn.
"""

import json
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path

from launch import exit_codes
from launch.local import num_ranks
from launch.submission import Selection, load_site, open_recipe, select
from launch.tables import print_table
from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import Part, StageConfig
from megatron_vl.cost.parameters import model_parameters


@dataclass(frozen=True)
class StagePlan:
    """What one stage would do."""

    stage: str
    source: str
    trainable: list[str]
    carries: str
    steps: int
    sequences: int
    tokens: int
    """Positions trained on: steps times sequences times their length, padding included."""
    ranks: int
    layout: str
    parameters: int
    trainable_parameters: int
    config_hash: str


def plan_stage(source: Path, config: StageConfig) -> StagePlan:
    """The plan of one checked stage."""
    parallel, train, carry = config.parallel, config.train, config.carry
    sequences = train.steps * train.global_batch
    counted = model_parameters(config.model)
    axes = ("tensor", "pipeline", "context", "data")
    split = [f"{axis} {size}" for axis in axes if (size := getattr(parallel, axis)) > 1]
    split += ["sequence"] * parallel.sequence
    carried = [f"{carry.weights.name} weights"]
    carried += [f"fresh {part.name}" for part in carry.fresh]
    carried += ["optimizer"] * carry.optimizer + ["data cursor"] * carry.data_cursor
    return StagePlan(
        stage=config.name,
        source=str(source),
        trainable=[part.name for part in train.trainable],
        carries=", ".join(carried),
        steps=train.steps,
        sequences=sequences,
        tokens=sequences * config.data.sequence_length,
        ranks=num_ranks(config),
        layout=", ".join(split),
        parameters=counted.total,
        trainable_parameters=counted.of_parts({part.value for part in train.trainable}),
        config_hash=config_hash(config),
    )


def main(args: Namespace) -> int:
    """Print the plan of the selected stages."""
    load_site(args.site)
    selection = Selection(args.first, args.last, tuple(args.skip))
    _, stages, selection = open_recipe(Path(args.recipe), selection, args.overrides)
    chosen = select([name for name, _, _ in stages], selection)
    plans = [plan_stage(path, config) for name, path, config in stages if name in chosen]
    if args.json:
        print(json.dumps({"stages": [asdict(plan) for plan in plans]}))
    else:
        _print(args.recipe, plans)
    return exit_codes.OK


def _print(recipe: str, plans: list[StagePlan]) -> None:
    rows = [
        (
            plan.stage,
            "all" if len(plan.trainable) == len(Part) else " ".join(plan.trainable),
            plan.carries,
            plan.layout,
            f"{plan.ranks:,}",
            f"{plan.steps:,}",
            f"{plan.sequences:,}",
            short_count(plan.tokens),
            short_count(plan.parameters),
            short_count(plan.trainable_parameters),
        )
        for plan in plans
    ]
    names = ("stage", "trains", "starts from", "layout", "ranks", "steps", "sequences", "tokens")
    title = f"{recipe}: {len(plans)} stage(s)"
    print_table(title, (*names, "parameters", "learning"), rows, left=4)
    total = short_count(sum(plan.tokens for plan in plans))
    print(f"{total} tokens in all; every check passed")


def short_count(value: int) -> str:
    """A count with three digits and a unit, such as 1.23 M."""
    for unit, size in ((" T", 10**12), (" B", 10**9), (" M", 10**6), (" K", 10**3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g}{unit}"
    return str(value)
