"""One rank of any layout, built without its weights: what it allocates, to the byte.

What: the model, megatron-core's gradient buffers and its distributed optimizer, on the meta device
in a world of one process that only pretends to have the others.
Why: `mvl plan --build-rank` shows what `cost.bytes` computes, from the objects a job would make.
What it refuses (ValueError): a rank that the layout does not have. What it costs: the objects of
the rank's modules and no tensor memory; seconds for the 12B.

Optimizer moments are made at the first step; their bytes are those of the shards they belong to.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from megatron_vl.config.schema import Precision, StageConfig
from megatron_vl.cost.bytes import MOMENT_BYTES, RankBytes
from megatron_vl.engine.layer_specs import blocks_for
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.train.build import Trainee, bare_model, prepare_training


@dataclass(frozen=True)
class BuiltRank:
    """A rank as it would be.

    Attributes:
        place: its index along each axis, and among the ranks that share the optimizer state.
        layers: decoder layers it holds, a character of the pattern each.
        tensors, parameters: how many it holds.
        trainable: elements that learn.
        bytes: what it allocates; FP8 copies are not made before the first step.
    """

    place: dict[str, int]
    layers: str
    tensors: int
    parameters: int
    trainable: int
    bytes: RankBytes


def build_rank(config: StageConfig, rank: int) -> BuiltRank:
    """Build a rank of the stage's layout. The process must not have joined a world."""
    ranks = config.parallel.ranks
    if not 0 <= rank < ranks:
        raise ValueError(
            f"rank {rank} of {config.name}: the layout has ranks 0 to {ranks - 1}; nearest valid: "
            f"{min(max(rank, 0), ranks - 1)}"
        )
    with pretend_rank(config.parallel, rank) as groups, meta_device():
        module = bare_model(config, groups, blocks_for(PLATFORM))
        trainee = prepare_training(module, config, groups)
        parameters = list(module.parameters())
        return BuiltRank(
            place={
                "tensor": groups.tp.rank(),
                "pipeline": groups.pp.rank(),
                "context": groups.cp.rank(),
                "data": groups.dp.rank(),
                "shard": groups.dp_cp.rank(),
            },
            layers="".join(module.language_model.decoder.layer_type_list),
            tensors=len(parameters),
            parameters=sum(parameter.numel() for parameter in parameters),
            trainable=sum(trainee.trainable.values()),
            bytes=_bytes(trainee, config),
        )


def _bytes(trainee: Trainee, config: StageConfig) -> RankBytes:
    buffers = trainee.wrapped.buffers
    frozen = [p for p in trainee.module.parameters() if not p.requires_grad]
    optimizer = trainee.optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    shards = [
        parameter
        for part in parts
        if part.optimizer is not None
        for group in part.optimizer.param_groups
        for parameter in group["params"]
    ]
    copy = 0 if config.precision is Precision.fp32 else 4
    return RankBytes(
        weights=_size(buffer.param_data for buffer in buffers) + _size(frozen),
        gradients=_size(buffer.grad_data for buffer in buffers),
        optimizer=(MOMENT_BYTES + copy) * sum(shard.numel() for shard in shards),
    )


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
