"""Fine-tuning the released model: one node, from an imported stage, back to Hugging Face's form."""

from pathlib import Path

import pytest

from launch.plan_memory import GIB, stage_memory
from launch.submission import run_folder
from megatron_vl.config.recipe import load_graph
from megatron_vl.config.schema_node import ReleaseNode
from megatron_vl.run.folder import RunError
from tests.conftest import REPOSITORY

RECIPE = REPOSITORY / "stages" / "finetune_12b"
FULL = REPOSITORY / "stages" / "nano_12b_v2_vl"


def test_the_recipe_fits_one_node_of_eight() -> None:
    recipe = load_graph(RECIPE)
    assert [entry.name for entry in recipe.entries] == ["init", "tune", "release"]
    configs = {name: config for name, _, config in recipe.stages}
    released = {name: config for name, _, config in load_graph(FULL).stages}["stage4"]
    for config in configs.values():
        assert config.parallel.ranks == 8
        assert config.model == released.model
        assert config.data.tile_size == released.data.tile_size
        assert max(row.total for row in stage_memory(config)) < 60 * GIB
    release = recipe["release"].config
    assert isinstance(release, ReleaseNode)
    assert release.formats == {"bf16": "tune"}


def test_a_run_may_begin_with_imported_stages(tmp_path: Path) -> None:
    run = tmp_path / "run"
    made = run / "stages" / "00_init"
    made.mkdir(parents=True)
    with pytest.raises(RunError, match="holds other files"):
        run_folder(str(run))
    (made / "origin.json").write_text("{}")
    assert run_folder(str(run)).path == run
    (run / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds other files"):
        run_folder(str(run))
