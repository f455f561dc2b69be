"""Every rule between keys: what breaks it, and the nearest value the message offers."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.config.check import check_recipe, nearest_divisor, nearest_multiple
from megatron_vl.config.load import load_stage
from tests.support.problems import problems

LAPTOP = Path(__file__).parents[2] / "stages" / "laptop"


@pytest.mark.parametrize(
    ("overrides", "rule", "nearest"),
    [
        (["train.steps=0"], "train.steps is 0, must be at least 1", "nearest valid: 1"),
        (["train.threads=-1"], "must be at least 0", "nearest valid: 0"),
        (["model.encoder.num_layers=0"], "model.encoder.num_layers is 0", "nearest valid: 1"),
        (["optimizer.lr=0"], "must be a number above 0", "1e-5"),
        (["optimizer.beta2=1"], "below 1", "0.999"),
        (
            ["optimizer.min_lr=1", "optimizer.lr=0.001"],
            "between 0 and optimizer.lr",
            "nearest valid: 0.001",
        ),
        (["optimizer.min_lr=-1"], "between 0 and optimizer.lr", "nearest valid: 0.0"),
        (["model.decoder.pattern=MX*-MM-Q"], "holds 'Q' 'X'", "'M*-MM-'"),
        (["model.decoder.num_query_groups=3"], "must divide", "nearest valid: 2"),
        (["model.decoder.mamba_num_groups=3"], "must divide", "nearest valid: 2"),
        (["model.encoder.num_attention_heads=5"], "must divide", "nearest valid: 4"),
        (["model.padded_vocab_size=2000"], "at least model.vocab_size 2048", "nearest valid: 2048"),
        (["parallel.tensor=3"], "parallel.tensor is 3, must divide", "parallel.tensor 2"),
        (["parallel.tensor=3"], "model.padded_vocab_size is 2048", "parallel.tensor 2"),
        (
            ["parallel.tensor=4"],
            "num_query_groups is 2 and model.decoder.mamba_num_groups is 2",
            "parallel.tensor 2, or model.decoder.num_query_groups 4 and",
        ),
        (["parallel.pipeline=3"], "8 layers", "parallel.pipeline 2, or set parallel.first_stage_l"),
        (["parallel.first_stage_layers=2"], "parallel.pipeline is 1", "nearest valid: 0"),
        (
            ["parallel.pipeline=3", "parallel.first_stage_layers=3"],
            "must leave a multiple of 2",
            "nearest valid: 2",
        ),
        (["parallel.sequence=true"], "parallel.tensor is 1", "parallel.tensor 2"),
        (
            ["parallel.sequence=true", "parallel.tensor=2", "data.sequence_length=511"],
            "multiple of 2, that is parallel.tensor 2",
            "nearest valid: 512",
        ),
        (["data.tile_size=60"], "must be a multiple of 16", "nearest valid: 64"),
        (["data.tile_size=512"], "64 patches a side", "data.tile_size 256, or position_grid 64"),
        (
            ["parallel.data=3", "train.global_batch=8"],
            "train.global_batch is 8",
            "train.global_batch 9, or parallel.data 2",
        ),
        (["data.blend={}"], "data.blend is empty", "captions"),
        (["data.blend.text=0"], "data.blend.text is 0.0, must be above 0", "leave the source out"),
        (["data.builder=desktop"], "must be one of", "laptop, none"),
        (["train.trainable=[]"], "is empty", "[encoder, projector, decoder]"),
        (["train.trainable=[decoder, decoder]"], "twice", "nearest valid: [decoder]"),
        (
            ["train.trainable=[decoder]", "carry.fresh=[projector]"],
            "does not train it",
            "train.trainable [decoder, projector]",
        ),
        (["carry.weights=random", "carry.fresh=[decoder]"], "draws all", "set carry.fresh: []"),
        (["carry.weights=random", "carry.optimizer=true"], "moments", "carry.optimizer: false"),
        (["carry.optimizer=true", "carry.fresh=[decoder]"], "no moments", "carry.optimizer: false"),
    ],
)
def test_a_broken_rule_names_the_nearest_value(
    overrides: list[str], rule: str, nearest: str
) -> None:
    found = [text for text in problems(*overrides) if rule in text]
    assert found, problems(*overrides)
    assert any(nearest in text for text in found), found


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["parallel.tensor=2", "parallel.sequence=true"],
        ["parallel.pipeline=2", "parallel.data=2", "parallel.tensor=2"],
        ["parallel.pipeline=2", "parallel.first_stage_layers=3"],
        ["parallel.pipeline=3", "parallel.first_stage_layers=2"],
        ["carry.weights=random"],
        ["carry.fresh=[projector]"],
        ["data.tile_size=256"],
    ],
)
def test_sound_settings_pass(overrides: list[str]) -> None:
    assert problems(*overrides) == []


def test_what_the_message_offers_is_valid() -> None:
    assert problems("parallel.pipeline=3", "parallel.first_stage_layers=2") == []
    assert problems("train.global_batch=9", "parallel.data=3", "evaluation.packs=3") == []
    assert problems("data.tile_size=512", "model.encoder.position_grid=64") == []


def test_first_stage_of_a_recipe_draws_its_weights() -> None:
    stage = load_stage(LAPTOP / "stage1.yaml")
    assert "set carry.weights: random" in check_recipe([stage], whole=True)[0]
    assert check_recipe([stage], whole=False) == []


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.decoder.norm_epsilon=1e-6", "its model differs"),
        ("carry.optimizer=true", "set carry.optimizer: false"),
        ("carry.data_cursor=true", "set carry.data_cursor: false"),
        ("name=stage0", "2 stages are named 'stage0'"),
    ],
)
def test_what_is_handed_over_must_fit(override: str, message: str) -> None:
    before = load_stage(LAPTOP / "stage0.yaml")
    stage = load_stage(LAPTOP / "stage1.yaml", [override])
    assert any(message in text for text in check_recipe([before, stage], whole=False))


@given(st.integers(1, 10_000), st.integers(1, 500))
def test_nearest_multiple_is_one_and_none_is_nearer(value: int, factor: int) -> None:
    found = nearest_multiple(value, factor)
    assert found % factor == 0
    assert found > 0
    assert abs(found - value) <= factor / 2 or found == factor
    assert nearest_multiple(value, factor, up=True) - value in range(factor)


@given(st.integers(1, 500), st.integers(1, 500))
def test_nearest_divisor_is_one_and_none_is_nearer(whole: int, value: int) -> None:
    found = nearest_divisor(whole, value)
    assert whole % found == 0
    distances = [abs(size - value) for size in range(1, whole + 1) if whole % size == 0]
    assert abs(found - value) == min(distances)


def test_one_rule_broken_many_times_is_one_message() -> None:
    (message,) = problems("parallel.tensor=3")
    assert "8 sizes in all" in message
    assert len(message) < 250
