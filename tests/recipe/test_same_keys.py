"""The laptop recipe and the 12B recipe are one flow at two sizes."""

import re
from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import main
from megatron_vl.config.fields import leaf_fields
from megatron_vl.config.load import DEFAULT_ORIGIN, differences, load_with_origins
from megatron_vl.config.sizes import SIZE_KEYS
from tests.conftest import LAPTOP, REPOSITORY

FULL = REPOSITORY / "stages" / "nano_12b_v2_vl"
STAGES = ("stage0", "stage1", "stage2", "stage3", "stage4", "qad_nvfp4")


def set_keys(path: Path) -> set[str]:
    """The keys that a stage's files set; what follows from them is not set."""
    _, origins = load_with_origins(path)
    return {key for key, origin in origins.items() if not origin.startswith(DEFAULT_ORIGIN)}


@pytest.mark.parametrize("stage", STAGES)
def test_stages_differ_in_sizes_alone(stage: str) -> None:
    small, full = LAPTOP / f"{stage}.yaml", FULL / f"{stage}.yaml"
    (one, _), (two, _) = load_with_origins(small), load_with_origins(full)
    assert set(differences(one, two)) <= set(SIZE_KEYS)


@pytest.mark.parametrize("stage", STAGES)
def test_stages_set_the_same_keys(stage: str) -> None:
    """What one of them says and the other leaves to a default is a size, or the default itself."""
    small, full = LAPTOP / f"{stage}.yaml", FULL / f"{stage}.yaml"
    (config, _), fields = load_with_origins(full), leaf_fields()
    said_once = (set_keys(small) ^ set_keys(full)) - set(SIZE_KEYS)
    for key in said_once:
        value: object = config
        for name in key.split("."):
            value = getattr(value, name)
        assert value == fields[key].default, key


def test_both_recipes_have_these_stages_and_a_start() -> None:
    for folder in (LAPTOP, FULL):
        assert {path.stem for path in folder.glob("*.yaml")} >= {*STAGES, "base", "init", "release"}


def test_size_keys_are_keys_and_the_command_knows_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert set(SIZE_KEYS) <= set(leaf_fields())
    files = [str(folder / "stage1.yaml") for folder in (LAPTOP, FULL)]
    assert main(["config", "diff", "--but-sizes", *files]) == exit_codes.OK
    assert capsys.readouterr().out == "no difference\n"
    assert main(["config", "diff", *files]) == exit_codes.OK
    said = capsys.readouterr().out
    assert re.search(r"optimizer\.lr: \S+ -> 2\.0e-05\n    set in line \d+ -> set in line", said)
    assert f"model.decoder.hidden_size: 128 -> 5120\n    inherited from {LAPTOP}/base.yaml:" in said
    assert "parallel.tensor: 1 -> 8\n    default -> inherited from" in said
