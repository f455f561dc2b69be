"""What a submission would change about a run: its graph, stages, scripts, site and code.

A run folder holds what was last submitted: `plan.yaml`, each stage's resolved file and `job.sh`,
`site.yaml` and the snapshot of the code. `compare` holds that against what would be submitted now.
Nothing is written and Slurm is not asked. A stage whose file the run has never held is new.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.graph import Selection, select
from launch.site import site_path
from launch.snapshot import snapshot_folder
from launch.submission import SITE_FILE, make_plan
from megatron_vl.config.load import differences, to_yaml
from megatron_vl.config.recipe import Recipe, load_work
from megatron_vl.run.folder import RunFolder, StageFolder

SCRIPT = "job.sh"
_OF_PLAN = ("recipe", "workdir", "site", "overrides", "selected")
_OF_STAGE = ("kind", "after", "takes", "skipped")


@dataclass(frozen=True)
class Difference:
    """One thing that would be otherwise.

    Attributes:
        stage: the stage it is about; empty for the run.
        what: stage (new or gone), graph, config, script, site, code or plan.
        key: the key, file or setting; empty for a whole stage.
        before: as it was last submitted; None for what is new.
        after: as it would be submitted now; None for what is gone.
    """

    stage: str
    what: str
    key: str
    before: Any
    after: Any

    def text(self) -> str:
        """The difference for a terminal: a line, or for scripts and sites the lines that differ."""
        where = ": ".join(word for word in (self.stage, self.what, self.key) if word)
        if self.what not in ("script", "site") or self.before is None:
            return f"{where}: {_shown(self.before)} -> {_shown(self.after)}"
        lines = difflib.unified_diff(
            str(self.before).splitlines(), str(self.after).splitlines(), lineterm="", n=0
        )
        changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
        return "\n".join([f"{where}:", *(f"  {line}" for line in changed)])


def compare(
    run: RunFolder,
    folder: Path,
    recipe: Recipe,
    selection: Selection,
    site: str,
    overrides: Sequence[str] = (),
    scripts: Mapping[str, str] | None = None,
) -> list[Difference]:
    """Everything that submitting this recipe now would change about a run; empty if nothing.

    Args:
        folder, recipe, selection: as `submission.open_recipe` gives them.
        scripts: the job scripts by stage, on a cluster.

    Raises RunError when the folder is no run yet, ConfigError for a selection that leaves nothing.
    """
    selected = select(recipe.graph, selection)
    before, after = run.plan(), make_plan(run, folder, recipe, selected, selection, site, overrides)
    found = [
        Difference("", "plan", key, before.get(key), after.get(key))
        for key in _OF_PLAN
        if before.get(key) != after.get(key)
    ]
    found += _site(run, site)
    code = snapshot_folder(run)
    snapshots = sorted(path.name for path in code.parent.glob("*"))
    if snapshots and not code.is_dir():
        found.append(Difference("", "code", "snapshot", ", ".join(snapshots), code.name))
    old = {entry["name"]: entry for entry in before["stages"]}
    new = {entry["name"]: entry for entry in after["stages"]}
    found += [Difference(name, "stage", "", "there", None) for name in old if name not in new]
    for name, entry in new.items():
        if name not in old:
            found.append(Difference(name, "stage", "", None, "new"))
            continue
        stage = StageFolder(run.path / "stages" / old[name]["folder"], name)
        found += _graph(name, old[name], entry)
        if name in selected:
            found += _work(stage, recipe, name)
            found += _script(stage, (scripts or {}).get(name))
    return found


def _graph(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Difference]:
    return [
        Difference(name, "graph", key, old.get(key), new.get(key))
        for key in _OF_STAGE
        if old.get(key) != new.get(key)
    ]


def _work(stage: StageFolder, recipe: Recipe, name: str) -> list[Difference]:
    work = recipe[name].config
    if not stage.work_path.is_file():
        return [Difference(name, "stage", "", None, "not submitted before")]
    if stage.work_path.read_text(encoding="utf-8") == to_yaml(work):
        return []
    changed = differences(load_work(stage.work_path), work)
    return [Difference(name, "config", key, one, two) for key, (one, two) in changed.items()]


def _script(stage: StageFolder, text: str | None) -> list[Difference]:
    path = stage.path / SCRIPT
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if text is None or text == before:
        return []
    return [Difference(stage.name, "script", SCRIPT, before, text)]


def _site(run: RunFolder, site: str) -> list[Difference]:
    path = run.path / SITE_FILE
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    after = site_path(site).read_text(encoding="utf-8")
    return [] if before == after else [Difference("", "site", SITE_FILE, before, after)]


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    return "a new one" if isinstance(value, str) and "\n" in value else str(value)
