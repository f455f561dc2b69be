"""The rules of FP8, each refused with the nearest value that keeps it."""

import pytest

from megatron_vl.config.check import check_stage
from megatron_vl.config.check_fp8 import bf16_layers
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from tests.conftest import LAPTOP

BLOCKWISE = "precision=fp8_blockwise"


def problems(*overrides: str) -> list[str]:
    try:
        return check_stage(load_stage(LAPTOP / "stage1.yaml", list(overrides)))
    except ConfigError as error:
        return [str(error)]


@pytest.mark.parametrize(
    ("overrides", "asked", "nearest"),
    [
        ([BLOCKWISE, "data.sequence_length=250"], "data.sequence_length is 250", "256"),
        ([BLOCKWISE, "data.sequence_length=9"], "must be a multiple of 16", "16"),
        ([BLOCKWISE, "model.encoder.num_prefix_tokens=10"], "74 encoder tokens", "16"),
        ([BLOCKWISE, "model.encoder.num_prefix_tokens=3"], "67 encoder tokens", "tokens 0"),
        (
            [BLOCKWISE, "data.tile_size=48", "model.encoder.num_prefix_tokens=8"],
            "(36 patches and model.encoder.num_prefix_tokens 8)",
            "num_prefix_tokens 12",
        ),
        (["fp8.keep_bf16=[decoder.8]"], "'decoder.8'", "decoder.7"),
        (["fp8.keep_bf16=[encoder.-1]"], "'encoder.-1'", "encoder.3"),
        (["fp8.keep_bf16=[lm_head]"], "'lm_head'", "decoder.0"),
        ([BLOCKWISE, "fp8.first_layers_bf16=7"], "leave none of the 8", "a sum of 7"),
        (["fp8.first_layers_bf16=-1"], "fp8.first_layers_bf16 is -1", "0"),
        (["fp8.amax_history=0"], "fp8.amax_history is 0", "1"),
    ],
)
def test_refused_with_the_nearest_valid_value(
    overrides: list[str], asked: str, nearest: str
) -> None:
    (problem,) = problems(*overrides)
    assert asked in problem
    assert "nearest valid: " in problem
    assert nearest in problem.rpartition("nearest valid: ")[2]


@pytest.mark.parametrize(
    "overrides",
    [
        [BLOCKWISE],
        ["precision=fp8_delayed", "fp8.drift_every=10", "fp8.keep_bf16=[projector,encoder.1]"],
        ["precision=bf16", "data.sequence_length=250", "model.encoder.num_prefix_tokens=10"],
        [BLOCKWISE, "fp8.first_layers_bf16=5", "fp8.last_layers_bf16=2"],
    ],
)
def test_sound(overrides: list[str]) -> None:
    assert problems(*overrides) == []


def test_ends_of_both_stacks_and_named_layers_are_kept() -> None:
    config = load_stage(
        LAPTOP / "stage1.yaml",
        [BLOCKWISE, "fp8.last_layers_bf16=2", "fp8.keep_bf16=[decoder.3,projector]"],
    )
    decoder = {"decoder.0", "decoder.3", "decoder.6", "decoder.7"}
    assert bf16_layers(config) == decoder | {"encoder.0", "encoder.2", "encoder.3", "projector"}
    config.fp8.first_layers_bf16 = config.fp8.last_layers_bf16 = 0
    assert bf16_layers(config) == {"decoder.3", "projector"}
