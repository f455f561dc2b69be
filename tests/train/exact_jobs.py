"""What ranks do in the exactness grid: one global batch of synthetic packs, and every gradient in
full shape. Needs no data on disk."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.engine import process_groups
from megatron_vl.engine.sharding import fill, sharded_tensors
from megatron_vl.model.initialize import draw_tensor, generator_for
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.checkpoint import LoopState, load_optimizer, load_weights
from megatron_vl.train.checkpoint_save import save
from megatron_vl.train.record import gather_reduced
from megatron_vl.train.step import count, run_batch, train_step
from megatron_vl.train.synthetic import Kind, Sample, samples_of, synthetic_packs
from tests.support.packs import run_pack


@dataclass(frozen=True)
class Shard:
    """A rank's part of one stored tensor's gradient."""

    key: str
    shape: tuple[int, ...]
    place: tuple[tuple[int, int], ...]
    values: Tensor


@dataclass(frozen=True)
class Batch:
    """What one rank got out of a global batch."""

    loss: float
    units: int
    shards: list[Shard]


def stage(file: Path, overrides: Sequence[str]) -> StageConfig:
    """The config of a job."""
    return load_stage(file, overrides)


def noisy_model(config: StageConfig, groups: ProcessGroupCollection) -> VisionLanguageModel:
    """Weights that depend on their names alone, none where a norm, bias or skip is the identity."""
    module = build_model(config, groups)

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator_for(77, key))
        return draw_tensor(key, shape, config.model, config.train.seed) + 0.03 * noise

    fill(module, groups, draw)
    return module


def noisy_trainee(config: StageConfig) -> Trainee:
    """The trainee of a layout with such weights."""
    groups = process_groups.create(config.parallel, config.train.seed)
    return prepare_training(noisy_model(config, groups), config, groups)


def batch(file: Path, overrides: Sequence[str], kinds: Sequence[Kind] = tuple(Kind)) -> Batch:
    """Loss and gradients of the first global batch at a layout."""
    config = stage(file, overrides)
    trainee = noisy_trainee(config)
    group = trainee.groups.dp
    packs = synthetic_packs(config, 0, rank=group.rank(), size=group.size(), kinds=kinds)
    return run_packs(packs, trainee, config)


def run_packs(packs: list[Pack], trainee: Trainee, config: StageConfig) -> Batch:
    """Loss and gradients of a global batch of which these are this rank's packs."""
    trainee.wrapped.train()
    trainee.wrapped.zero_grad_buffer()
    loss = run_batch(packs, count(packs, trainee), trainee, config, forward_only=False)
    gather_reduced(trainee)
    gradients = {
        name: parameter.main_grad
        for name, parameter in trainee.module.named_parameters()
        if parameter.requires_grad
    }
    units = sum(len(pack.grids) for pack in packs)
    return Batch(loss, units, shards(trainee.module, trainee.groups, gradients))


def shards(
    module: VisionLanguageModel, groups: ProcessGroupCollection, gradients: dict[str, Tensor]
) -> list[Shard]:
    """Gradients by stored name and place, as a checkpoint would store the parameters."""
    parameters: dict[str, nn.Parameter] = dict(module.named_parameters())
    for name, parameter in parameters.items():
        parameter.data = gradients.get(name, torch.zeros_like(parameter)).detach().clone()
    return [
        Shard(
            shard.key,
            tuple(shard.global_shape),
            tuple((part.start, part.stop) for part in shard.global_slice()),
            shard.data.detach().clone(),
        )
        for shard in sharded_tensors(module, groups)
    ]


def joined(batches: Sequence[Batch]) -> dict[str, Tensor]:
    """Full gradients from all ranks' shards; ranks that hold the same part must hold the same."""
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for one in batches:
        for shard in one.shards:
            whole = full.setdefault(shard.key, torch.zeros(shard.shape))
            known = seen.setdefault(shard.key, torch.zeros(shard.shape, dtype=torch.bool))
            place = tuple(slice(start, stop) for start, stop in shard.place)
            if bool(known[place].any()):
                difference = float((whole[place] - shard.values).norm())
                assert difference <= 1e-6 * float(whole[place].norm()), f"{shard.key}: replicas"
            whole[place] = shard.values
            known[place] = True
    for key, known in seen.items():
        assert bool(known.all()), f"{key}: no rank holds part of it"
    return full


def alone(
    file: Path, overrides: Sequence[str], kinds: Sequence[Kind] = tuple(Kind)
) -> tuple[float, dict[str, Tensor]]:
    """The reference: every document of the batch alone, without padding, one after the other,
    through plain autograd on one rank."""
    config = stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = noisy_model(config, groups)
    total, weight = 0.0, 0.0
    packs = [
        document_pack(config, sample)
        for number in range(config.train.global_batch)
        for sample in samples_of(config, number, kinds)
    ]
    weight = sum(pack.weight_total for pack in packs)
    for pack in packs:
        loss = (run_pack(module, pack, with_labels=True) * pack.loss_weights_L).sum() / weight
        loss.backward()
        total += float(loss.detach())
    gradients = {
        name: parameter.grad
        for name, parameter in module.named_parameters()
        if parameter.grad is not None
    }
    return total, joined([Batch(total, 0, shards(module, groups, gradients))])


def document_pack(config: StageConfig, sample: Sample) -> Pack:
    """One document alone, without padding."""
    return make_pack(
        [sample.document],
        sample.pictures,
        ["alone"],
        length=len(sample.document),
        patch_size=config.model.encoder.patch_size,
        pad_token=0,
    )


def three_steps(file: Path, overrides: Sequence[str], folder: Path | None = None) -> list[float]:
    """Losses and gradient norms of three optimizer steps; with a folder, a checkpoint is written
    there after the first."""
    config = stage(file, overrides)
    trainee = noisy_trainee(config)
    numbers = _step(trainee, config, 0)
    if folder is not None:
        trainable = sorted(part.value for part in config.train.trainable)
        save(folder, trainee, LoopState(config.name, 1, config.train.global_batch, True, trainable))
    return [*numbers, *_step(trainee, config, 1), *_step(trainee, config, 2)]


def two_more_steps(file: Path, overrides: Sequence[str], folder: Path) -> list[float]:
    """The numbers of the second and third step, from what `three_steps` saved."""
    config = stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    load_weights(folder, module, groups)
    trainee = prepare_training(module, config, groups)
    load_optimizer(folder, trainee)
    return [*_step(trainee, config, 1), *_step(trainee, config, 2)]


def _step(trainee: Trainee, config: StageConfig, step: int) -> tuple[float, float]:
    group = trainee.groups.dp
    packs = synthetic_packs(config, step, rank=group.rank(), size=group.size())
    result = train_step(packs, count(packs, trainee), trainee, config, 1e-3)
    return result.loss, result.grad_norm
