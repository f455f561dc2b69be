"""From a recipe and a command line to a run folder that a supervisor can run without asking.

`prepare` resolves every stage, checks that the selection and what the run already holds fit
together, and writes `plan.yaml` and each selected stage's `config.yaml`. From then on the run
folder is the only source: editing the recipe does not change a run under way.

Refuses: a run made from other stages; a changed configuration of a stage that is already done.
"""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from launch.graph import Selection, folder_names, num_ranks, num_steps, select, takes
from launch.lock import LOCK_NAME
from launch.site import load_site, site_path
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import config_hash, differences, flatten, to_yaml
from megatron_vl.config.recipe import Entry, Recipe, load_graph, load_work
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import AssembleNode, Work
from megatron_vl.data.marker import built_by_other_code
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.receipt import RERUN, now

_ORIGIN = "origin.json"
"""What `mvl checkpoint import` and `assemble` leave in a stage they make (checkpoint_tools.lineage,
which a login node cannot import)."""
SITE_FILE = "site.yaml"
"""The site's file as it was when the run was submitted, in the run folder."""


def open_recipe(
    path: Path, selection: Selection, overrides: Sequence[str]
) -> tuple[Path, Recipe, Selection]:
    """Load a recipe folder; a stage file selects itself from the folder it lies in."""
    if path.is_file():
        if selection != Selection():
            raise ConfigError(f"{path} is one stage; --from, --until and --skip need a folder")
        selection = Selection(path.stem, path.stem)
        path = path.parent
    return path, load_graph(path, overrides), selection


def run_folder(text: str) -> RunFolder:
    """The run folder that `--run` names: a run, or a place for a new one. Raises RunError."""
    path = Path(text)
    if not text.strip():
        raise RunError("--run is empty; name a folder, such as runs/demo")
    if path.exists() and not path.is_dir():
        raise RunError(f"--run {path}: is a file; name a folder, such as {path.parent / 'run'}")
    run = RunFolder(path)
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if not run.exists() and files - {LOCK_NAME} and not _holds_imports_alone(path):
        raise RunError(
            f"--run {path}: holds other files (such as {min(files)}) and no run; name a new "
            f"folder, such as {path / 'run'}"
        )
    return run


def _holds_imports_alone(path: Path) -> bool:
    """Whether a folder holds stages that `mvl checkpoint` made of others' weights, and no more."""
    if {file.name for file in path.iterdir()} - {LOCK_NAME} != {"stages"}:
        return False
    stages = list((path / "stages").iterdir())
    return bool(stages) and all((stage / _ORIGIN).is_file() for stage in stages)


def check_data(recipe: str, configs: Sequence[StageConfig]) -> None:
    """Refuse stages whose data is not there, before anything starts. Raises ConfigError."""
    problems = missing_data(configs)
    if problems:
        overrides = {f" data.root={shlex.quote(config.data.root)}" for config in configs}
        raise ConfigError(
            [*problems, f"to make it: mvl data prepare {shlex.quote(recipe)}{min(overrides)}"]
        )


def outdated_data(recipe: str, configs: Sequence[StageConfig]) -> list[str]:
    """One note for each laptop data set that an earlier version of its builder made."""
    roots = {config.data.root for config in configs if config.data.builder == "laptop"}
    return [
        f"{root} was made by another version of its builder, which would make other samples now; "
        f"to make it anew: mvl data prepare {shlex.quote(recipe)} data.root={shlex.quote(root)}"
        for root in sorted(roots)
        if built_by_other_code(Path(root))
    ]


def missing_data(configs: Sequence[StageConfig]) -> list[str]:
    """What the stages read that is not on disk, one message each."""
    problems = []
    for config in configs:
        root = Path(config.data.root)
        if not root.is_dir():
            problems.append(
                f"data.root is {config.data.root}: no such folder (looked in {Path.cwd()})"
            )
            continue
        there = sorted(path.name for path in root.iterdir() if (path / ".nv-meta").is_dir())
        for source in config.data.blend:
            if source not in there:
                held = ", ".join(there) or "no source"
                problems.append(f"{config.name}: data.blend names {source}; {root} holds {held}")
    return list(dict.fromkeys(problems))


def prepare(
    recipe: Path,
    run: RunFolder,
    selection: Selection,
    site: str,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Write the run folder and return the names of the selected stages.

    Raises ConfigError for a recipe or selection that cannot be run, RunError for a run folder that
    holds something else.
    """
    folder, graph, selection = open_recipe(recipe, selection, overrides)
    selected = select(graph.graph, selection)
    plan = make_plan(run, folder, graph, selected, selection, site, overrides)
    site_text = site_path(site).read_text(encoding="utf-8")
    if run.exists():
        _refuse_other_recipe(run, plan)
    configs = {entry.name: entry.config for entry in graph.entries}
    folders = {
        entry["name"]: StageFolder(run.path / "stages" / entry["folder"], entry["name"])
        for entry in plan["stages"]
    }
    problems = [
        problem
        for name in selected
        if (problem := _changed_when_done(run, folders[name], configs[name]))
    ]
    problems += [f"{name}: {key}" for name in selected for key in unwritable(configs[name])]
    if problems:
        raise RunError("\n".join(problems))
    run.create(plan)
    atomic.write_text(run.path / SITE_FILE, site_text)
    for name in selected:
        _write_work(folders[name], configs[name], graph)
    run.journal.append("planned", recipe=str(folder), stages=selected, overrides=list(overrides))
    return selected


def changed_stages(run: RunFolder, recipe: Recipe) -> list[str]:
    """The stages of a run that another configuration is about to replace."""
    if not run.exists():
        return []
    before = {stage.name: stage for stage in run.stages()}
    return [
        entry.name
        for entry in recipe.entries
        if entry.name in before
        and before[entry.name].work_path.is_file()
        and config_hash(load_work(before[entry.name].work_path)) != config_hash(entry.config)
    ]


def _write_work(stage: StageFolder, work: Work, recipe: Recipe) -> None:
    """Write what a stage or node does, and for an assembly the stage its weights stand for."""
    if isinstance(work, StageConfig):
        atomic.write_text(stage.config_path, to_yaml(work))
        return
    atomic.write_text(stage.node_path, to_yaml(work))
    if isinstance(work, AssembleNode):
        like = recipe[work.like].config
        assert isinstance(like, StageConfig)
        atomic.write_text(stage.config_path, to_yaml(replace(like, name=work.name, after="")))


def make_plan(
    run: RunFolder,
    folder: Path,
    recipe: Recipe,
    selected: list[str],
    selection: Selection,
    site: str,
    overrides: Sequence[str],
) -> dict[str, Any]:
    """What `plan.yaml` holds: every stage and node with what it waits for, and what is asked."""
    earlier = run.plan()["stages"] if run.exists() else []
    skipped = {entry["name"] for entry in earlier if entry["skipped"]}
    folders = folder_names(recipe)
    entries = [
        {
            "name": entry.name,
            "kind": entry.kind,
            "folder": folders[entry.name],
            "source": str(entry.path),
            "after": list(recipe.graph.parents[entry.name]),
            **_takes(recipe, entry),
            "config_hash": config_hash(entry.config),
            "steps": num_steps(entry.config),
            "ranks": num_ranks(entry.config),
            "skipped": entry.name in selection.skip
            or (entry.name in skipped and entry.name not in selected),
        }
        for entry in recipe.entries
    ]
    return {
        "schema": 1,
        "run": run.name,
        "created": now(),
        "recipe": str(folder),
        "workdir": str(Path.cwd()),
        "site": site,
        "launcher": load_site(site).launcher.name,
        "overrides": list(overrides),
        "selected": selected,
        "stages": entries,
    }


def _takes(recipe: Recipe, entry: Entry) -> dict[str, dict[str, str]]:
    taken = takes(recipe, entry.name)
    return {"takes": taken} if taken else {}


def unwritable(config: Work) -> list[str]:
    """The values that a file would not give back as they are (YAML folds some line ends)."""
    again = yaml.safe_load(to_yaml(config))
    return [
        f"{key} is {value!r}, which a stage file cannot hold as it is; take out the line end"
        for key, value in flatten(config).items()
        if functools.reduce(lambda found, name: found[name], key.split("."), again) != value
    ]


def _refuse_other_recipe(run: RunFolder, plan: dict[str, Any]) -> None:
    """A run keeps its recipe: its folders are numbered, its receipts name their parents."""
    earlier = run.plan()
    before = [entry["name"] for entry in earlier["stages"]]
    after = [entry["name"] for entry in plan["stages"]]
    if before != after:
        raise RunError(
            f"{run.path} was made from {earlier['recipe']} with the stages {', '.join(before)}; "
            f"{plan['recipe']} has {', '.join(after)}. Choose another --run"
        )
    same = Path(earlier["recipe"]).resolve() == Path(plan["recipe"]).resolve()
    if not same and any(stage.last_attempt() for stage in run.stages()):
        raise RunError(
            f"{run.path} was started from the recipe {earlier['recipe']}, not {plan['recipe']}; "
            f"submit {earlier['recipe']} to go on, or choose another --run"
        )


def _changed_when_done(run: RunFolder, stage: StageFolder, config: Work) -> str | None:
    """What is wrong with running `config` where a done stage lies, if anything is."""
    receipt = stage.receipt()
    if receipt is None or receipt.config_hash == config_hash(config):
        return None
    if not receipt.done or receipt.kind in RERUN:
        return None
    changed = differences(load_work(stage.work_path), config)
    listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
    return (
        f"{stage.name} of {run.path} is done with another configuration ({listed}). Choose another "
        "--run to train it anew, or --from a later stage to go on from it as it is"
    )
