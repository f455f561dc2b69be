"""What a submission would change about a run, key by key."""

from pathlib import Path
from typing import Any

import pytest

from launch.difference import Difference, compare
from launch.graph import Selection
from launch.submission import open_recipe, prepare
from megatron_vl.run.folder import RunFolder
from tests.launch.node_recipe import stage, write_node_recipe


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    recipe = write_node_recipe(tmp_path / "recipe", gate="gate: {at_most: {x: 1}}\n")
    prepare(recipe, run, Selection(), "local", ["train.seed=5"])
    return run


def changes(run: RunFolder, *overrides: str, skip: tuple[str, ...] = (), **others: Any) -> set:
    recipe = run.path.parent / "recipe"
    folder, graph, selection = open_recipe(recipe, Selection(skip=skip), overrides)
    found = compare(run, folder, graph, selection, "local", overrides, **others)
    return {(one.stage, one.what, one.key, str(one.before), str(one.after)) for one in found}


def test_the_same_again_changes_nothing(run: RunFolder) -> None:
    assert changes(run, "train.seed=5") == set()


def test_every_kind_of_change_is_named(run: RunFolder) -> None:
    write_node_recipe(
        run.path.parent / "recipe",
        gate="gate: {at_most: {x: 2}}\n",
        stage1=stage("stage1", "after: stage0"),
    )
    (run.stage("stage0").path / "job.sh").write_text("#!/bin/bash\n#SBATCH --nodes=1\nrun\n")
    (run.path / "code" / "0123456789ab").mkdir(parents=True)
    script = "#!/bin/bash\n#SBATCH --nodes=2\nrun\n"
    found = changes(run, "train.seed=5", scripts={"stage0": script})
    assert {(stage, what, key) for stage, what, key, _, _ in found} == {
        ("", "code", "snapshot"),
        ("check", "config", "gate.at_most"),
        ("stage0", "script", "job.sh"),
        ("stage1", "config", "after"),
        ("stage1", "graph", "after"),
    }
    assert ("stage1", "graph", "after", "['check']", "['stage0']") in found
    assert ("check", "config", "gate.at_most", "{'x': 1.0}", "{'x': 2.0}") in found


def test_overrides_and_skipped_stages(run: RunFolder) -> None:
    found = changes(run, "train.seed=6", skip=("check",))
    assert ("stage0", "config", "train.seed", "5", "6") in found
    assert ("check", "graph", "skipped", "False", "True") in found
    assert not any(stage == "check" and what == "config" for stage, what, *_ in found)


def test_a_script_is_shown_by_its_lines() -> None:
    one = Difference("s", "script", "job.sh", "a\nb\nc\n", "a\nB\nc\n")
    assert one.text() == "s: script: job.sh:\n  -b\n  +B"
    assert Difference("s", "config", "train.seed", 5, 6).text() == "s: config: train.seed: 5 -> 6"
    new = Difference("s", "script", "job.sh", None, "a\nb\n")
    assert new.text() == "s: script: job.sh: nothing -> a new one"
