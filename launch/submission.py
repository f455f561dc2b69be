"""From a recipe and a command line to a run folder that a supervisor can run without asking.

`prepare` resolves every stage, checks that the selection and what the run already holds fit
together, and writes `plan.yaml` and each selected stage's `config.yaml`. From then on the run
folder is the only source: editing the recipe does not change a run under way.

Refuses: a run made from other stages; a changed configuration of a stage that is already done.
"""

import functools
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from launch.lock import LOCK_NAME
from launch.site import load_site, site_path
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import (
    config_hash,
    differences,
    flatten,
    load_recipe,
    load_stage,
    to_yaml,
)
from megatron_vl.config.schema import StageConfig
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.receipt import now

SITE_FILE = "site.yaml"
"""The site's file as it was when the run was submitted, in the run folder."""
Stages = list[tuple[str, Path, StageConfig]]


@dataclass(frozen=True)
class Selection:
    """Which stages of a recipe are run; None is no bound."""

    first: str | None = None
    last: str | None = None
    skip: tuple[str, ...] = ()


def select(names: Sequence[str], selection: Selection) -> list[str]:
    """The selected names, in order. Raises ConfigError for a name the recipe lacks or for none."""
    for option, name in [
        ("--from", selection.first),
        ("--until", selection.last),
        *(("--skip", name) for name in selection.skip),
    ]:
        if name is not None and name not in names:
            raise ConfigError(f"{option} {name}: no such stage; there are {', '.join(names)}")
    start = names.index(selection.first) if selection.first else 0
    end = names.index(selection.last) + 1 if selection.last else len(names)
    chosen = [name for name in names[start:end] if name not in selection.skip]
    if not chosen:
        raise ConfigError(
            f"--from {selection.first}, --until {selection.last} and --skip "
            f"{' '.join(selection.skip)} leave no stage; there are {', '.join(names)}"
        )
    return chosen


def open_recipe(
    path: Path, selection: Selection, overrides: Sequence[str]
) -> tuple[Path, Stages, Selection]:
    """Load a recipe folder; a stage file selects itself from the folder it lies in."""
    if path.is_file():
        if selection != Selection():
            raise ConfigError(f"{path} is one stage; --from, --until and --skip need a folder")
        selection = Selection(path.stem, path.stem)
        path = path.parent
    return path, load_recipe(path, overrides), selection


def run_folder(text: str) -> RunFolder:
    """The run folder that `--run` names: a run, or a place for a new one. Raises RunError."""
    path = Path(text)
    if not text.strip():
        raise RunError("--run is empty; name a folder, such as runs/demo")
    if path.exists() and not path.is_dir():
        raise RunError(f"--run {path}: is a file; name a folder, such as {path.parent / 'run'}")
    run = RunFolder(path)
    files = {file.name for file in path.iterdir()} if path.is_dir() else set()
    if not run.exists() and files - {LOCK_NAME}:
        raise RunError(
            f"--run {path}: holds other files (such as {min(files)}) and no run; name a new "
            f"folder, such as {path / 'run'}"
        )
    return run


def check_data(recipe: str, configs: Sequence[StageConfig]) -> None:
    """Refuse stages whose data is not there, before anything starts. Raises ConfigError."""
    problems = missing_data(configs)
    if problems:
        overrides = {f" data.root={shlex.quote(config.data.root)}" for config in configs}
        raise ConfigError(
            [*problems, f"to make it: mvl data prepare {shlex.quote(recipe)}{min(overrides)}"]
        )


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
    folder, stages, selection = open_recipe(recipe, selection, overrides)
    selected = select([name for name, _, _ in stages], selection)
    plan = _plan(run, folder, stages, selected, selection, site, overrides)
    site_text = site_path(site).read_text(encoding="utf-8")
    if run.exists():
        _refuse_other_recipe(run, plan)
    configs = {name: config for name, _, config in stages}
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
        atomic.write_text(folders[name].config_path, to_yaml(configs[name]))
    run.journal.append("planned", recipe=str(folder), stages=selected, overrides=list(overrides))
    return selected


def changed_stages(run: RunFolder, stages: Stages) -> list[str]:
    """The stages of a run that another configuration is about to replace."""
    if not run.exists():
        return []
    before = {stage.name: stage for stage in run.stages()}
    return [
        name
        for name, _, config in stages
        if name in before
        and before[name].config_path.is_file()
        and load_stage(before[name].config_path) != config
    ]


def folder_name(index: int, name: str) -> str:
    """The name of a stage's folder: its place in the recipe, then its name."""
    return f"{index:02d}_{name}"


def _plan(
    run: RunFolder,
    folder: Path,
    stages: Stages,
    selected: list[str],
    selection: Selection,
    site: str,
    overrides: Sequence[str],
) -> dict[str, Any]:
    earlier = run.plan()["stages"] if run.exists() else []
    skipped = {entry["name"] for entry in earlier if entry["skipped"]}
    entries = [
        {
            "name": name,
            "folder": folder_name(index, name),
            "source": str(path),
            "config_hash": config_hash(config),
            "steps": config.train.steps,
            "ranks": config.parallel.ranks,
            "skipped": name in selection.skip or (name in skipped and name not in selected),
        }
        for index, (name, path, config) in enumerate(stages)
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


def unwritable(config: StageConfig) -> list[str]:
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


def _changed_when_done(run: RunFolder, stage: StageFolder, config: StageConfig) -> str | None:
    """What is wrong with running `config` where a done stage lies, if anything is."""
    receipt = stage.receipt()
    if receipt is None or not receipt.done or receipt.config_hash == config_hash(config):
        return None
    changed = differences(load_stage(stage.config_path), config)
    listed = ", ".join(f"{key} {old!r} -> {new!r}" for key, (old, new) in changed.items())
    return (
        f"{stage.name} of {run.path} is done with another configuration ({listed}). Choose another "
        "--run to train it anew, or --from a later stage to go on from it as it is"
    )
