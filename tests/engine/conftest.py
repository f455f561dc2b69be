"""The laptop model with weights far from any symmetric start, in a world of one rank."""

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
    return load_stage(LAPTOP / "stage1.yaml", ["parallel.data=1", "precision=fp32"])


@pytest.fixture(scope="module")
def model(config: StageConfig) -> Iterator[VisionLanguageModel]:
    """Every parameter is moved by noise, so that no norm, bias or skip is the identity."""
    with one_rank() as groups:
        module = build_model(config, groups)
        initialize(module, groups, config.model, seed=21)
        generator = torch.Generator().manual_seed(22)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        module.eval()
        yield module
