"""The laptop model with weights far from any symmetric start, for comparisons."""

from collections.abc import Iterator

import pytest
import torch

import megatron_vl.engine  # noqa: F401
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import build_model
from tests.conftest import LAPTOP
from tests.support.one_rank import one_rank


@pytest.fixture(scope="module")
def config() -> StageConfig:
    return load_stage(LAPTOP / "stage1.yaml")


@pytest.fixture(scope="module")
def model(config: StageConfig) -> Iterator[VisionLanguageModel]:
    """Drawn weights, then every parameter moved by noise: norms, biases, D and dt_bias included."""
    with one_rank() as groups:
        module = build_model(config, groups)
        initialize(module, groups, config.model, seed=3)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise, alpha=0.1 * float(parameter.std(correction=0)) + 0.02)
        module.eval()
        yield module
