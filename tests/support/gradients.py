"""Gradients of one global batch at any layout, whole, by the name a checkpoint gives each tensor.

The packs are made here, so that a test says which micro-batch shows pictures. Rank r of d
data-parallel ranks takes every d-th pack, from the r-th.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine import process_groups
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import part_of
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.record import gather_reduced, gradients_as_weights
from megatron_vl.train.step import count, run_batch
from tests.support.packs import pack_of_documents, picture_documents

LENGTHS = (70, 58, 2, 60, 38)
TILES = {"pictures": (2, 1, 0, 1, 0), "text": (0, 0, 0, 0, 0)}


@dataclass(frozen=True)
class Part:
    """What one rank holds of a gradient: where it lies in the whole, and the whole's shape."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    values: Tensor


@dataclass(frozen=True)
class RankGradients:
    """One rank's view of a batch.

    Attributes:
        loss: of the global batch.
        tiles: pictures in each of this rank's packs.
        parts: by key, of every parameter that learns and lives on this rank.
    """

    loss: float
    tiles: list[int]
    parts: dict[str, list[Part]]


def batch(config: StageConfig, names: Sequence[str]) -> list[Pack]:
    """A pack for each name, "pictures" or "text", padded to the sequence length."""
    packs = []
    for number, name in enumerate(names):
        generator = torch.Generator().manual_seed(100 + number)
        documents, pictures = picture_documents(config, LENGTHS, TILES[name], generator)
        packs.append(pack_of_documents(config, documents, pictures, config.data.sequence_length))
    return packs


def batch_gradients(file: Path, overrides: list[str], names: Sequence[str]) -> RankGradients:
    """What a rank runs: draw weights, one global batch forward and backward, all reductions."""
    config = load_stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    return gradients_of(prepare_training(module, config, groups), config, names)


def gradients_of(trainee: Trainee, config: StageConfig, names: Sequence[str]) -> RankGradients:
    """One global batch on a trainee that stands ready."""
    group = trainee.groups.dp
    packs = batch(config, names)[group.rank() :: group.size()]
    trainee.wrapped.train()
    trainee.wrapped.zero_grad_buffer()
    loss = run_batch(packs, count(packs, trainee), trainee, config, forward_only=False)
    gather_reduced(trainee)
    learns = {part.value for part in config.train.trainable}
    parts: dict[str, list[Part]] = {}
    with gradients_as_weights(trainee):
        for shard in sharded_tensors(trainee.module, trainee.groups):
            if part_of(shard.key).value in learns:
                values = shard.data.detach().clone().view(shard.local_shape)
                part = Part(tuple(shard.global_offset), tuple(shard.global_shape), values)
                parts.setdefault(shard.key, []).append(part)
    return RankGradients(loss, [len(pack.grids) for pack in packs], parts)


def whole(ranks: Iterable[RankGradients]) -> dict[str, Tensor]:
    """Join the parts of all ranks; parts that several ranks hold must agree."""
    found: dict[str, Tensor] = {}
    for rank in ranks:
        for key, parts in rank.parts.items():
            for part in parts:
                tensor = found.setdefault(key, torch.full(part.shape, float("nan")))
                sizes = zip(part.offset, part.values.shape, strict=True)
                place = tensor[tuple(slice(start, start + size) for start, size in sizes)]
                if not place.isnan().all():
                    assert distance(part.values, place) < 1e-6, f"ranks disagree about {key}"
                place.copy_(part.values)
    for key, tensor in found.items():
        assert tensor.isfinite().all(), f"no rank holds all of {key}, or it is not finite"
    return found


def distance(found: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of what is expected; 0 where both are 0."""
    difference = float((found.double() - expected.double()).norm())
    return difference / max(float(expected.double().norm()), 1e-30) if difference else 0.0


def assert_equal_gradients(
    found: Sequence[RankGradients], expected: RankGradients, *, at_most: float = 1e-4
) -> dict[str, Tensor]:
    """Losses to 1e-5, every gradient to `at_most` in relative L2 norm. Returns the expected."""
    for rank in found:
        assert abs(rank.loss - expected.loss) <= 1e-5 * abs(expected.loss)
    ours, theirs = whole(found), whole([expected])
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        assert distance(ours[key], gradient) < at_most, key
    return theirs
