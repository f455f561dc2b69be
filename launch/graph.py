"""What of a recipe's graph is submitted, and where each stage starts from. Pure functions.

`megatron_vl.run.graph` holds the graph itself, `megatron_vl.config.recipe` reads it from a folder.
Here is what a submission asks of it. `--from S` selects S and all that can only come after it,
`--until S` all that must come before S, and S; `--skip S` leaves S out, and its children start from
its parents.

Refuses: names that the recipe lacks, a selection that leaves nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.recipe import Recipe, source_of
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import ReleaseNode, Work
from megatron_vl.run.graph import Graph


@dataclass(frozen=True)
class Selection:
    """Which stages of a recipe are run; None is no bound."""

    first: str | None = None
    last: str | None = None
    skip: tuple[str, ...] = ()


def select(graph: Graph, selection: Selection) -> list[str]:
    """The selected names, in order. Raises ConfigError for a name the recipe lacks or for none."""
    names = graph.names
    for option, name in [
        ("--from", selection.first),
        ("--until", selection.last),
        *(("--skip", name) for name in selection.skip),
    ]:
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: no such stage; there are {', '.join(names)}")
    left = set(names) - set(selection.skip)
    if selection.first is not None:
        left &= {selection.first, *graph.descendants(selection.first)}
    if selection.last is not None:
        left &= {selection.last, *graph.ancestors(selection.last)}
    chosen = [name for name in names if name in left]
    if not chosen:
        raise ConfigError(
            f"--from {selection.first}, --until {selection.last} and --skip "
            f"{' '.join(selection.skip)} leave no stage; there are {', '.join(names)}"
        )
    return chosen


def starts_from(recipe: Recipe, skip: Sequence[str] = ()) -> dict[str, str | None]:
    """The stage whose checkpoint each stage or node takes, with some left out; None for the head.

    A release takes several: it is given with the first, see `takes`.
    """
    kinds = {entry.name: entry.kind for entry in recipe.entries}
    graph = recipe.graph.without(skip)
    return {
        name: source_of(parents[0], graph, kinds) if parents else None
        for name, parents in graph.parents.items()
    }


def takes(recipe: Recipe, name: str) -> dict[str, str]:
    """The stage of each format of a release; empty for everything else."""
    config = recipe[name].config
    return dict(config.formats) if isinstance(config, ReleaseNode) else {}


def folder_names(recipe: Recipe) -> dict[str, str]:
    """The folder of each stage and node under `stages/`: its place in the order, then its name."""
    return {entry.name: f"{at:02d}_{entry.name}" for at, entry in enumerate(recipe.entries)}


def num_ranks(work: Work) -> int:
    """The processes it runs as."""
    return work.parallel.ranks if isinstance(work, StageConfig) else 1


def num_steps(work: Work) -> int:
    """The steps it takes; 0 for a node."""
    return work.train.steps if isinstance(work, StageConfig) else 0


def stages_of(recipe: Recipe, names: Sequence[str]) -> list[StageConfig]:
    """The training stages among some names."""
    return [config for name, _, config in recipe.stages if name in names]
