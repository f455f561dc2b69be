"""The model the parts run: 12B widths, few layers, one rank, weights drawn on the device."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.shorten import shorten
from megatron_vl.engine import process_groups
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import Trainee, build_model, prepare_training

STAGE = Path(__file__).with_name("stage.yaml")
SMOKE_STAGE = Path(__file__).parents[2] / "stages" / "laptop" / "stage1.yaml"
SMOKE = ["parallel.data=1", "train.global_batch=1", "train.threads=1"]


def stage(smoke: bool, *overrides: str, recompute: bool = False) -> StageConfig:
    """The stage of the bench with overrides; the laptop's sizes for a trial.

    Args:
        recompute: every layer's activations.
    """
    file, common = (SMOKE_STAGE, SMOKE) if smoke else (STAGE, [])
    config = shorten(load_stage(file, [*common, *overrides]), encoder_layers=8)
    if recompute:
        config.recompute.decoder = len(config.model.decoder.pattern)
        config.recompute.encoder = config.model.encoder.num_layers
    return config


@contextlib.contextmanager
def world() -> Iterator[None]:
    """A world of this one process."""
    with tempfile.TemporaryDirectory(prefix="mvl-gpu-") as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        try:
            yield
        finally:
            process_groups.leave_world()


@contextlib.contextmanager
def groups_of(config: StageConfig) -> Iterator[ProcessGroupCollection]:
    """The process groups of a stage, for as long as it is measured."""
    groups = process_groups.create(config.parallel, config.train.seed)
    try:
        yield groups
    finally:
        process_groups.destroy()


def drawn_model(config: StageConfig, groups: ProcessGroupCollection) -> VisionLanguageModel:
    """The stage's model; matrices normal, decay rates and time steps in Mamba-2's usual range."""
    module = build_model(config, groups)
    device = next(module.parameters()).device
    generator = torch.Generator(device=device).manual_seed(3)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=config.model.decoder.init_std, generator=generator)
            elif name.endswith("A_log"):
                parameter.uniform_(1.0, 16.0, generator=generator).log_()
            elif name.endswith("dt_bias"):
                parameter.fill_(-4.0)
            else:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    return module


def drawn_trainee(config: StageConfig, groups: ProcessGroupCollection) -> Trainee:
    """The stage's model with gradient buffers and optimizer."""
    return prepare_training(drawn_model(config, groups), config, groups)
