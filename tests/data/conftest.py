"""One small prepared data set for all tests of the data room."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import settings

from megatron_vl.config.schema import Part, StageConfig, TrainConfig
from megatron_vl.config.schema_data import DataConfig
from megatron_vl.data.prepare import prepare_laptop
from megatron_vl.data.tokenizer import Tokenizer
from tests.support.sizes import small

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

SIZES = {
    "captions": 24,
    "ocr": 30,
    "qa": 24,
    "clips": 12,
    "code": 30,
    "text": 40,
    "long_text": 6,
}


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> StageConfig:
    """A stage whose data is prepared."""
    root, model = tmp_path_factory.mktemp("data") / "laptop", small()
    config = StageConfig(
        name="test",
        model=replace(
            model,
            vocab_size=2048,
            padded_vocab_size=2048,
            encoder=replace(model.encoder, patch_size=8, position_grid=128),
        ),
        data=DataConfig(
            root=str(root),
            builder="laptop",
            blend={"captions": 2.0, "ocr": 1.0, "qa": 1.0, "text": 2.0, "code": 1.0},
            sequence_length=512,
            tile_size=64,
            packing_window=60,
        ),
        train=TrainConfig(trainable=list(Part), steps=1, global_batch=4),
    )
    prepare_laptop(config.data, config.model, seed=7, sizes=SIZES, progress=lambda line: None)
    return config


@pytest.fixture(scope="session")
def root(stage: StageConfig) -> Path:
    """The folder of the prepared data."""
    return Path(stage.data.root)


@pytest.fixture(scope="session")
def tokenizer(root: Path) -> Tokenizer:
    """The tokenizer of the prepared data."""
    return Tokenizer.load(root / "tokenizer" / "tokenizer.json")


def with_data(config: StageConfig, **changes: object) -> StageConfig:
    """The stage with other data settings."""
    return replace(config, data=replace(config.data, **changes))  # type: ignore[arg-type]
