"""What ranks do in the gradient tests: one global batch, and every full gradient before the
optimizer step."""

import copy
from pathlib import Path

import torch
import torch.distributed
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.train.build import Trainee
from megatron_vl.train.step import count, run_batch
from tests.train.jobs import drawn


def gradients(
    file: Path, overrides: list[str], sources: list[str]
) -> tuple[float, list[int], dict[str, Tensor]]:
    """One batch with one pack of each source; rank r of d takes every d-th, from the r-th.

    Returns:
        Its loss, the tiles of this rank's packs, and the gradient of each trainable parameter.
    """
    config = load_stage(file, overrides)
    trainee = drawn(config)
    group = trainee.groups.dp
    packs = [one_pack(config, source, number) for number, source in enumerate(sources)]
    mine = packs[group.rank() :: group.size()]
    trainee.wrapped.train()
    trainee.wrapped.zero_grad_buffer()
    loss = run_batch(mine, count(mine, trainee), trainee, config, forward_only=False)
    return loss, [len(pack.tiles_TCHW) for pack in mine], full_gradients(trainee)


def one_pack(config: StageConfig, source: str, number: int) -> Pack:
    """The pack of that number of one source alone, the same on every rank."""
    config = from_source(config, source)
    loader = PackLoader(config, split="train", rank=0, size=1, cursor=number)
    try:
        return loader.next_batch()[0]
    finally:
        loader.close()


def from_source(config: StageConfig, source: str) -> StageConfig:
    """The config with another blend, one pack a batch."""
    other = copy.deepcopy(config)
    other.data.blend = {source: 1.0}
    other.train.global_batch = 1
    return other


def full_gradients(trainee: Trainee) -> dict[str, Tensor]:
    """Reduced gradients by parameter name; each rank has reduced its own shard of a buffer."""
    size, rank = trainee.groups.dp.size(), trainee.groups.dp.rank()
    for buffer in trainee.wrapped.buffers:
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(size))
            torch.distributed.all_gather(
                shards, bucket.grad_data.chunk(size)[rank].clone(), group=trainee.groups.dp
            )
            bucket.grad_data.copy_(torch.cat(shards))
    return {
        name: parameter.main_grad.detach().clone()
        for name, parameter in trainee.module.named_parameters()
        if parameter.requires_grad
    }
