"""What ranks do with an imported checkpoint: load it at a layout, compare, write it again."""

from pathlib import Path

import torch

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.initialize import initialize
from megatron_vl.train.build import build_model, prepare_training
from megatron_vl.train.checkpoint import full_tensors, load_weights, read_state
from megatron_vl.train.checkpoint_save import save


def compare_shards(stage: Path, overrides: list[str]) -> tuple[int, list[str]]:
    """Load the stage folder's checkpoint; the tensors this rank holds, and those that differ."""
    config, checkpoint = _open(stage, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, seed=99)
    load_weights(checkpoint, module, groups)
    stored = full_tensors(checkpoint)
    shards = list(sharded_tensors(module, groups))
    wrong = [
        shard.key
        for shard in shards
        if not torch.equal(shard.data.cpu(), stored[shard.key][shard.global_slice()].to(shard.data))
    ]
    return len(shards), wrong


def load_and_save(stage: Path, overrides: list[str], folder: Path) -> None:
    """Load the stage folder's checkpoint and save it as the trainer does."""
    config, checkpoint = _open(stage, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    load_weights(checkpoint, module, groups)
    save(folder, prepare_training(module, config, groups), read_state(checkpoint))


def _open(stage: Path, overrides: list[str]) -> tuple[StageConfig, Path]:
    config = load_stage(stage / "config.yaml", overrides)
    return config, stage / "checkpoints" / "step_000000"
