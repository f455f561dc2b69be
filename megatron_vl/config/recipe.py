"""A recipe folder as a graph: training stages and nodes, each with what it comes after.

`init` comes first, then the other files by name with numbers in numeric order, each after the one
before; a file with an `after:` key leaves that order and comes after what it names. An evaluation
passes its parent's checkpoint on, so a stage may come after one. A gate's reference comes before
the gate. Files whose name starts with `base` are neither stage nor node.

Refuses, with the problems of all files in one error: what `load_stage` and `load_node` refuse, a
name that is not the file's, and what breaks a rule between stages: missing parents, circles, two
heads, models that do not fit, a gate that compares or branches where it cannot.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vl.config.check import check_recipe
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_with_origins
from megatron_vl.config.load_node import load_node_with_origins, node_kind
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_gate import GateConfig
from megatron_vl.config.schema_node import AssembleNode, ReleaseNode, Work
from megatron_vl.run.graph import Graph, make_graph

TRAIN = "train"


@dataclass(frozen=True)
class Entry:
    """One file of a recipe, resolved."""

    name: str
    path: Path
    config: Work
    origins: dict[str, str]
    """What set each key: `file:line`, an override, or `default`."""

    @property
    def kind(self) -> str:
        """`train`, or what the node does."""
        return kind_of(self.config)


@dataclass(frozen=True)
class Recipe:
    """A recipe: its files in the order they run, and the graph they form."""

    entries: list[Entry]
    graph: Graph

    def __getitem__(self, name: str) -> Entry:
        """The entry of a name."""
        return next(entry for entry in self.entries if entry.name == name)

    @property
    def stages(self) -> list[tuple[str, Path, StageConfig]]:
        """The training stages: name, file, config."""
        return [
            (entry.name, entry.path, entry.config)
            for entry in self.entries
            if isinstance(entry.config, StageConfig)
        ]


def kind_of(work: Work) -> str:
    """`train`, or what a node does."""
    return TRAIN if isinstance(work, StageConfig) else work.node.name


def gate_of(work: Work) -> GateConfig:
    """The gate behind a stage or node; one without bounds where it has none."""
    return GateConfig() if isinstance(work, AssembleNode) else work.gate


def load_work(path: Path | str, overrides: Sequence[str] = ()) -> Work:
    """Load a stage's or a node's file, whichever it is. Raises ConfigError."""
    return load_work_with_origins(Path(path), overrides)[0]


def load_work_with_origins(
    path: Path, overrides: Sequence[str] = ()
) -> tuple[Work, dict[str, str]]:
    """As `load_work`, with the place that set each key: `file:line`, an override, or `default`."""
    if node_kind(path) is None:
        return load_with_origins(path, overrides)
    return load_node_with_origins(path, overrides)


def load_recipe(
    folder: Path | str, overrides: Sequence[str] = ()
) -> list[tuple[str, Path, StageConfig]]:
    """The training stages of a recipe, in the order they run: (name, file, config).

    `folder` may also be one stage file, a recipe of one stage. Raises ConfigError.
    """
    return load_graph(folder, overrides).stages


def load_graph(folder: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Load every stage and node of a recipe folder, or one file alone. Raises ConfigError."""
    folder = Path(folder)
    entries: list[Entry] = []
    problems: list[str] = []
    broken: dict[str, list[Path]] = {}
    for path in stage_files(folder):
        try:
            config, origins = load_work_with_origins(path, _meant(path, overrides))
        except ConfigError as error:
            for problem in error.problems:
                broken.setdefault(problem.removeprefix(f"{path}: "), []).append(path)
            continue
        if config.name != path.stem:
            problems.append(
                f"{path}: name is {config.name!r}, but a stage is named after its file: "
                f"set `name: {path.stem}`"
            )
        entries.append(Entry(config.name, path, config, origins))
    problems += [_once(problem, paths) for problem, paths in broken.items()]
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    if not folder.is_dir():
        return Recipe(entries, Graph({entry.name: () for entry in entries}))
    graph = make_graph({entry.name: _after(entry.config) for entry in entries})
    recipe = Recipe([_named(entries, name) for name in graph.names], graph)
    problems = _between(recipe)
    if problems:
        raise ConfigError(problems)
    return recipe


def _meant(path: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides a file of a recipe takes: those of gate.otherwise only where it has a gate."""
    gates = [text for text in overrides if text.partition("=")[0].strip() == "gate.otherwise"]
    others = [text for text in overrides if text not in gates]
    if not gates or not gate_of(load_work(path, others)).asks:
        return others
    return list(overrides)


def source_of(name: str, graph: Graph, kinds: Mapping[str, str]) -> str | None:
    """The stage whose checkpoint a name stands for: its own, or its parent's if it passes it on."""
    while kinds[name] not in (TRAIN, "assemble"):
        parents = graph.parents[name]
        if not parents:
            return None
        name = parents[0]
    return name


def stage_files(folder: Path) -> list[Path]:
    """The files of a recipe folder by name, `init` first. Raises ConfigError when none is."""
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        beside = [str(path) for path in folder.parent.glob("*") if _is_recipe(path)]
        near = difflib.get_close_matches(str(folder), beside, 1, 0.0)
        nearest = f"; nearest valid: {near[0]}" if near else f" (looked in {Path.cwd()})"
        raise ConfigError(f"{folder}: no such recipe folder or stage file{nearest}")
    files = [path for path in folder.glob("*.yaml") if not path.stem.startswith("base")]
    if not files:
        raise ConfigError(f"{folder}: holds no stage file (*.yaml other than base*.yaml)")
    return sorted(files, key=lambda path: _run_order(path.stem))


def _is_recipe(path: Path) -> bool:
    """Whether a path could be named as a recipe."""
    return path.suffix == ".yaml" or (path.is_dir() and any(path.glob("*.yaml")))


def _after(config: Work) -> list[str] | None:
    """What a file says it comes after; None for "the one before it"."""
    if isinstance(config, AssembleNode):
        return []
    if isinstance(config, ReleaseNode):
        parents = list(config.formats.values())
    else:
        parents = [config.after] if config.after else []
    reference = [config.gate.reference] if config.gate.reference else []
    if not parents:
        return None
    return [*parents, *reference]


def _between(recipe: Recipe) -> list[str]:
    """Every rule broken between the files of a recipe."""
    kinds = {entry.name: entry.kind for entry in recipe.entries}
    stages = [config for _, _, config in recipe.stages]
    parents = {}
    for name, before in recipe.graph.parents.items():
        source = source_of(before[0], recipe.graph, kinds) if before else None
        if source is not None and kinds[source] == TRAIN:
            parents[name] = source
    problems = [*_node_rules(recipe, kinds), *_gate_rules(recipe)]
    if stages:
        whole = recipe.entries[0].kind == TRAIN
        problems += check_recipe(stages, whole=whole, parents=parents)
    return list(dict.fromkeys(problems))


def _node_rules(recipe: Recipe, kinds: Mapping[str, str]) -> list[str]:
    problems = []
    names = [name for name, _, _ in recipe.stages]
    for entry in recipe.entries:
        config = entry.config
        if isinstance(config, AssembleNode) and config.like not in names:
            problems.append(
                f"{entry.path}: like is {config.like!r}, which is no training stage of the "
                f"recipe; there are {', '.join(names)}"
            )
        for parent in recipe.graph.parents[entry.name][:1]:
            if kinds[parent] == "release":
                problems.append(
                    f"{entry.path}: comes after {parent}, which is a release and leaves no "
                    f"checkpoint; nearest valid: after: {recipe.graph.parents[parent][0]}"
                )
    return problems


def _gate_rules(recipe: Recipe) -> list[str]:
    """A gate's reference comes before it, a stage to branch to right after it."""
    problems = []
    for entry in recipe.entries:
        gate = gate_of(entry.config)
        earlier = recipe.graph.ancestors(entry.name)
        children = recipe.graph.children(entry.name)
        if gate.reference and gate.reference not in earlier:
            problems.append(
                f"{entry.path}: gate.reference is {gate.reference!r}, which does not come before "
                f"{entry.name}; before it come {', '.join(earlier) or 'none'}"
            )
        if gate.branch_to and gate.branch_to not in children:
            problems.append(
                f"{entry.path}: gate.branch_to is {gate.branch_to!r}, which does not come right "
                f"after {entry.name}; after it come {', '.join(children) or 'none'}"
            )
    return problems


def _named(entries: Sequence[Entry], name: str) -> Entry:
    return next(entry for entry in entries if entry.name == name)


def _once(problem: str, paths: list[Path]) -> str:
    """A problem that one or several stage files share, told once."""
    if problem.startswith(("override ", f"{paths[0].parent}{os.sep}")):
        return problem  # it names its own place: an override, a base file, a line
    first, *rest = paths
    others = ", ".join(path.name for path in rest)
    return f"{first}{f' (so too {others})' if others else ''}: {problem}"


def _run_order(name: str) -> tuple:
    words = re.split(r"(\d+)", name)
    return (name != "init", [int(word) if word.isdigit() else word for word in words])
