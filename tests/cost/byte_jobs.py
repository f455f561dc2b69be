"""What ranks do in the tests of bytes: count what a step really holds."""

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import Precision
from megatron_vl.cost.bytes import RankBytes, rank_bytes
from megatron_vl.train.step import count, train_step
from tests.support.packs import pack_of_documents, picture_documents
from tests.train.jobs import drawn

LENGTHS, TILES = (72, 56, 4, 60, 40), (2, 1, 0, 1, 0)
"""Two chunks for each of two context ranks divide the lengths."""


def held(file: Path, overrides: list[str]) -> tuple[RankBytes, RankBytes]:
    """Bytes of this rank as `cost` says, and as they are after one step."""
    config = load_stage(file, overrides)
    trainee = drawn(config)
    generator = torch.Generator().manual_seed(trainee.groups.dp.rank())
    documents, pictures = picture_documents(config, LENGTHS, TILES, generator)
    packs = [pack_of_documents(config, documents, pictures, config.data.sequence_length)]
    train_step(packs, count(packs, trainee), trainee, config, 1e-3)
    weights = storages(parameter for parameter in trainee.module.parameters())
    gradients = storages(buffer.grad_data for buffer in trainee.wrapped.buffers)
    optimizer = trainee.optimizer
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    state: list[Tensor] = []
    for part in inner:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = part.optimizer.state[parameter]
                state += [moments[key] for key in ("exp_avg", "exp_avg_sq")]
                # Below float32 the optimizer steps a copy.
                state += [parameter] * (config.precision is not Precision.fp32)
    groups = trainee.groups
    expected = rank_bytes(config, groups.pp.rank(), groups.dp_cp.rank())
    return expected, RankBytes(weights, gradients, sum(map(size, state)))


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each once."""
    found = {}
    for tensor in tensors:
        storage = tensor.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def size(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()
