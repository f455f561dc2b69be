"""A stage made shallow keeps its widths and layout, and one layer of each kind."""

import pytest

from megatron_vl.config.check import check_stage
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig, WeightSource
from megatron_vl.config.shorten import shorten
from tests.conftest import LAPTOP
from tests.support.sizes import PATTERN_12B


@pytest.fixture(scope="module")
def stage() -> StageConfig:
    config = load_stage(LAPTOP / "stage1.yaml")
    config.model.decoder.pattern = PATTERN_12B
    return config


@pytest.mark.parametrize(
    ("pipeline", "layers", "pattern"),
    [
        (1, 0, "M-M-M-M*"),
        (4, 0, "M-M-M-M*"),
        (3, 0, "M-M-M-M*-"),
        (2, 3, "M-M-"),
        (1, 62, PATTERN_12B),
        (4, 62, PATTERN_12B[:60]),
    ],
)
def test_layers_kept(stage: StageConfig, pipeline: int, layers: int, pattern: str) -> None:
    stage.parallel.pipeline = pipeline
    short = shorten(stage, layers=layers)
    assert short.model.decoder.pattern == pattern
    assert short.model.encoder.num_layers == 2
    assert short.carry.weights is WeightSource.random
    assert not check_stage(short)


def test_the_stage_itself_is_left_alone(stage: StageConfig) -> None:
    stage.parallel.pipeline = 1
    shorten(stage, encoder_layers=1)
    assert stage.model.decoder.pattern == PATTERN_12B
    assert stage.model.encoder.num_layers == 4


def test_what_is_refused(stage: StageConfig) -> None:
    stage.parallel.pipeline = 1
    with pytest.raises(ValueError, match="63 layers were asked for, the pattern has 62"):
        shorten(stage, layers=63)
    stage.parallel.pipeline = 64
    with pytest.raises(ValueError, match=r"nearest valid: parallel\.pipeline 62"):
        shorten(stage)
