"""Loading stage files: what is accepted, what is refused, and in which words."""

from pathlib import Path

import pytest

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import (
    config_hash,
    differences,
    load_stage,
    load_with_origins,
    to_yaml,
)
from megatron_vl.config.recipe import load_recipe, stage_files
from megatron_vl.config.schema import Part, Precision, WeightSource
from tests.conftest import DRAWN

LAPTOP = Path(__file__).parents[2] / "stages" / "laptop"
STAGE = LAPTOP / "stage1.yaml"


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refusal(*args: object, **kwargs: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_stage(*args, **kwargs)  # type: ignore[arg-type]
    return str(caught.value)


def test_stage_stands_on_its_base() -> None:
    config = load_stage(STAGE)
    assert config.name == "stage1"
    assert config.precision is Precision.fp32
    assert config.model.decoder.pattern == "M-M*-MM-"
    assert config.train.trainable == [Part.encoder, Part.projector, Part.decoder]


def test_last_word_wins_along_a_chain_of_bases(tmp_path: Path) -> None:
    write(tmp_path, "base.yaml", f"base: {LAPTOP / 'stage1.yaml'}\ntrain: {{steps: 7}}\n")
    write(tmp_path, "base_b.yaml", "base: base.yaml\noptimizer: {lr: 2e-4}\n")
    stage = write(tmp_path, "mine.yaml", "base: base_b.yaml\nname: mine\ntrain: {seed: 5}\n")
    config, origins = load_with_origins(stage, ["train.seed=6"])
    assert (config.train.steps, config.train.seed, config.optimizer.lr) == (7, 6, 2e-4)
    assert origins["train.steps"] == f"{tmp_path / 'base.yaml'}:2"
    assert origins["optimizer.lr"] == f"{tmp_path / 'base_b.yaml'}:2"
    assert origins["train.seed"] == "override 'train.seed=6'"
    assert origins["optimizer.epsilon"] == "default"


def test_lists_and_blends_are_replaced_not_merged(tmp_path: Path) -> None:
    stage = write(
        tmp_path,
        "mine.yaml",
        f"base: {STAGE}\nname: mine\n"
        "data: {blend: {code: 1}}\ntrain: {trainable: [decoder]}\n",
    )
    config = load_stage(stage)
    assert config.data.blend == {"code": 1.0}
    assert config.train.trainable == [Part.decoder]


def test_an_override_adds_one_source_to_a_blend() -> None:
    config = load_stage(STAGE, ["data.blend.extra=0.25"])
    assert config.data.blend["extra"] == 0.25
    assert config.data.blend["captions"] == 2.0


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("train.steps=12", "train.steps", 12),
        ("optimizer.lr=2e-4", "optimizer.lr", 2e-4),
        ("optimizer.lr=1", "optimizer.lr", 1.0),
        ("data.packing=false", "data.packing", False),
        ("precision=bf16", "precision", Precision.bf16),
        ("train.trainable=[projector]", "train.trainable", [Part.projector]),
        ("carry.weights=random", "carry.weights", WeightSource.random),
        ("data.root=a b=c", "data.root", "a b=c"),
        ("data.blend={text: 2}", "data.blend", {"text": 2.0}),
    ],
)
def test_overrides_take_their_types_from_the_schema(override: str, key: str, value: object) -> None:
    found: object = load_stage(STAGE, [override])
    for name in key.split("."):
        found = getattr(found, name)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("written", "nearest"),
    [
        ("parallel.tensr=2", "parallel.tensor"),
        ("optimizer.learning_rate=1", "optimizer.lr"),
        ("tensor=2", "parallel.tensor"),
        ("data.seq_length=9", "data.sequence_length"),
        ("train.globalbatch=9", "train.global_batch"),
        ("model.decoder.patern=M", "model.decoder.pattern"),
        ("sequence_length=9", "data.sequence_length"),
    ],
)
def test_unknown_key_names_the_nearest(written: str, nearest: str) -> None:
    text = refusal(STAGE, [written])
    assert repr(written.split("=")[0]) in text
    assert f"nearest valid key is {nearest!r}" in text


def test_unknown_key_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    stage = write(tmp_path, "mine.yaml", f"base: {STAGE}\nname: mine\noptimizer:\n  betta1: 0.5\n")
    text = refusal(stage)
    assert f"{stage}:4: unknown key 'optimizer.betta1'" in text
    assert "'optimizer.beta1'" in text


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.steps=many", "train.steps is 'many', expected an integer"),
        ("train.steps=2.5", "train.steps is 2.5, expected an integer"),
        ("train.steps=true", "train.steps is True, expected an integer"),
        ("optimizer.lr=fast", "expected a number"),
        ("data.packing=perhaps", "expected true or false"),
        ("precision=fp64", "expected one of fp32, bf16"),
        ("train.trainable=[eyes]", "expected a list, each one of encoder, projector, decoder"),
        ("train.trainable=projector", "expected a list"),
        ("data.blend.text=lots", "data.blend.text is 'lots', expected a number"),
        ("optimizer.lr=null", "expected a number"),
        ("data=3", "data is a section"),
        ("train.steps", "expected key=value"),
        ("data.root=${oc.env:HOME}", "not supported"),
    ],
)
def test_wrong_values_are_refused_in_words(override: str, expected: str) -> None:
    assert expected in refusal(STAGE, [override])


def test_all_problems_come_at_once() -> None:
    text = refusal(STAGE, ["train.stepz=1", "train.steps=many", "optimizer.lr=fast"])
    assert len(text.splitlines()) == 3


def test_missing_keys_are_listed_together(tmp_path: Path) -> None:
    stage = write(tmp_path, "mine.yaml", "name: mine\n")
    text = refusal(stage)
    for key in ("model.decoder.pattern", "optimizer.lr", "train.trainable", "data.root"):
        assert key in text


def test_circle_of_bases_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.yaml", "base: b.yaml\n")
    write(tmp_path, "b.yaml", "base: a.yaml\n")
    assert "goes round in a circle" in refusal(tmp_path / "a.yaml")


def test_missing_base_and_missing_file_are_named(tmp_path: Path) -> None:
    stage = write(tmp_path, "a.yaml", "base: nowhere.yaml\n")
    assert "nowhere.yaml" in refusal(stage)
    assert "cannot be read" in refusal(tmp_path / "none.yaml")


def test_a_key_set_twice_is_refused(tmp_path: Path) -> None:
    stage = write(tmp_path, "a.yaml", "train:\n  steps: 1\n  seed: 2\n  steps: 3\n")
    assert f"{stage}:4: train.steps is set a second time (first on line 2)" in refusal(stage)


@pytest.mark.parametrize("text", ["- a\n- b\n", "just words\n", "a: [1\n"])
def test_what_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    assert str(tmp_path) in refusal(write(tmp_path, "a.yaml", text))


def test_resolved_yaml_loads_to_an_equal_config(tmp_path: Path) -> None:
    config = load_stage(LAPTOP / "stage0.yaml", ["optimizer.lr=1.23456789e-5", "train.seed=9"])
    again = load_stage(write(tmp_path, "config.yaml", to_yaml(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)


def test_hash_follows_every_value_and_nothing_else() -> None:
    steps = load_stage(STAGE).train.steps
    plain = config_hash(load_stage(STAGE))
    assert len(plain) == 12
    assert config_hash(load_stage(STAGE, [f"train.steps={steps}"])) == plain
    for override in (f"train.steps={steps + 1}", "data.blend.text=3", "train.trainable=[decoder]"):
        assert config_hash(load_stage(STAGE, [override])) != plain


def test_differences_name_both_values() -> None:
    before, after = (load_stage(STAGE, [f"train.steps={steps}"]) for steps in (60, 61))
    assert differences(before, after) == {"train.steps": (60, 61)}


def test_laptop_recipe_has_its_stages_in_order() -> None:
    names = [name for name, _, _ in load_recipe(LAPTOP)]
    assert names == ["stage0", "stage1", "stage2", "stage3", "stage4", "qad_fp8", "qad_nvfp4"]


def test_stages_run_in_numeric_order(tmp_path: Path) -> None:
    for name in ("stage10", "stage2", "init", "base", "base_long", "stage0"):
        write(tmp_path, f"{name}.yaml", "")
    assert [path.stem for path in stage_files(tmp_path)] == ["init", "stage0", "stage2", "stage10"]


def test_a_recipe_reports_the_problems_of_all_its_stages(tmp_path: Path) -> None:
    write(tmp_path, "init.yaml", f"base: {DRAWN}\ntrain: {{stepz: 1}}\n")
    write(tmp_path, "stage0.yaml", f"base: {LAPTOP / 'stage0.yaml'}\nname: other\n")
    with pytest.raises(ConfigError) as caught:
        load_recipe(tmp_path)
    assert "train.stepz" in str(caught.value)
    assert "set `name: stage0`" in str(caught.value)


def test_a_problem_that_stages_share_is_told_once() -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(LAPTOP, ["parallel.tensor=3"])
    told = [text for text in caught.value.problems if "parallel.tensor is 3" in text]
    (problem,) = [text for text in told if "every size it cuts" in text]
    assert "stage0.yaml, stage1.yaml, stage2.yaml" in problem


@pytest.mark.parametrize("make", ["missing", "empty"])
def test_a_folder_without_stages_is_refused(tmp_path: Path, make: str) -> None:
    folder = tmp_path / "recipe"
    if make == "empty":
        folder.mkdir()
    with pytest.raises(ConfigError, match="recipe"):
        load_recipe(folder)
