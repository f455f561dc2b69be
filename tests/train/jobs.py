"""What ranks do in the distributed tests: train a few steps, save, load, compare."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.engine import process_groups
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.initialize import initialize
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.checkpoint import (
    LoopState,
    load_optimizer,
    load_weights,
    read_state,
)
from megatron_vl.train.checkpoint_save import save
from megatron_vl.train.evaluate_sets import HeldOutLoss, evaluate_set
from megatron_vl.train.schedule import learning_rate
from megatron_vl.train.step import count, train_step


@dataclass(frozen=True)
class Trained:
    """What a few steps gave."""

    losses: list[float]
    grad_norms: list[float]


def drawn(config: StageConfig) -> Trainee:
    """A trainee with freshly drawn weights at the config's layout."""
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    return prepare_training(module, config, groups)


def loaded(config: StageConfig, checkpoint: Path) -> Trainee:
    """A trainee that goes on from a checkpoint, optimizer state included."""
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    load_weights(checkpoint, module, groups)
    trainee = prepare_training(module, config, groups)
    load_optimizer(checkpoint, trainee)
    return trainee


def steps(trainee: Trainee, config: StageConfig, first: int, last: int) -> Trained:
    """Train steps first ... last - 1 on the packs that belong to them."""
    groups = trainee.groups
    loader = PackLoader(
        config,
        split="train",
        rank=groups.dp.rank(),
        size=groups.dp.size(),
        cursor=first * config.train.global_batch,
    )
    losses, norms = [], []
    try:
        for step in range(first, last):
            packs = loader.next_batch()
            rate = learning_rate(config.optimizer, step, config.train.steps)
            result = train_step(packs, count(packs, trainee), trainee, config, rate)
            losses.append(result.loss)
            norms.append(result.grad_norm)
    finally:
        loader.close()
    return Trained(losses, norms)


def train_from_scratch(file: Path, overrides: list[str], num_steps: int) -> Trained:
    """Draw weights, train `num_steps` steps."""
    config = load_stage(file, overrides)
    return steps(drawn(config), config, 0, num_steps)


def train_and_save(file: Path, overrides: list[str], num_steps: int, folder: Path) -> Trained:
    """Draw weights, train, save with optimizer state."""
    config = load_stage(file, overrides)
    trainee = drawn(config)
    result = steps(trainee, config, 0, num_steps)
    save(folder, trainee, _state(config, num_steps))
    return result


def load_and_save(file: Path, overrides: list[str], source: Path, folder: Path) -> None:
    """Load at one layout what another wrote, and write it again."""
    config = load_stage(file, overrides)
    save(folder, loaded(config, source), _state(config, read_state(source).step))


def load_and_train(file: Path, overrides: list[str], source: Path, num_steps: int) -> Trained:
    """Go on from a checkpoint."""
    config = load_stage(file, overrides)
    first = read_state(source).step
    return steps(loaded(config, source), config, first, first + num_steps)


def drawn_sums(file: Path, overrides: list[str]) -> dict[str, float]:
    """Sum of squares of every stored tensor part this rank holds as the main replica."""
    config = load_stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    sums: dict[str, float] = {}
    for shard in sharded_tensors(module, groups):
        if shard.replica_id in (0, (0, 0, 0)):
            square = float(torch.sum(shard.data.double() ** 2))
            sums[shard.key] = sums.get(shard.key, 0.0) + square
    return sums


def _state(config: StageConfig, step: int) -> LoopState:
    return LoopState(
        stage=config.name,
        step=step,
        data_cursor=step * config.train.global_batch,
        optimizer=True,
        trainable=sorted(part.value for part in config.train.trainable),
    )


def held_out(stage_file: Path, overrides: list[str], batches: int) -> HeldOutLoss:
    """The losses of drawn weights on a stage's held-out set."""
    config = load_stage(stage_file, overrides)
    found = evaluate_set(config, drawn(config), batches)
    process_groups.destroy()
    return found
