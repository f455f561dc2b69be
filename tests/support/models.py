"""The laptop model with weights far from any symmetric start, in a world of one rank."""

import contextlib
from collections.abc import Iterator

import torch

import megatron_vl.engine  # noqa: F401
from megatron_vl.config.schema import StageConfig
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import build_model
from tests.support.one_rank import one_rank


@contextlib.contextmanager
def perturbed_model(config: StageConfig) -> Iterator[VisionLanguageModel]:
    """Drawn weights, then every parameter moved by noise: no norm, bias or skip is the identity."""
    with one_rank() as groups:
        module = build_model(config, groups)
        initialize(module, groups, config.model, seed=21)
        generator = torch.Generator().manual_seed(22)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)
        module.eval()
        yield module
