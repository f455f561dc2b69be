"""Walks the tensors of a model by their layout-free names.

megatron-core describes every parameter by a key, a global shape and the part of it this rank holds.
Mamba's fused projections are described piece by piece (`in_proj.weight.z`, `.x`, ...), as they are
stored. What is done through these descriptions is the same at any layout.
"""

from collections.abc import Callable, Iterator

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

# The axis of its weight that each kind of layer splits over tensor ranks.
SPLIT_AXIS: dict[type[torch.nn.Module], int] = {
    ColumnParallelLinear: 0,
    RowParallelLinear: 1,
    VocabParallelEmbedding: 0,
}

CheckpointMetadata = dict[str, object]


def checkpoint_metadata(groups: ProcessGroupCollection) -> CheckpointMetadata:
    """How state is laid out on disk: one key a layer, optimizer state that loads at any layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "non_homogeneous_layers": True,
        "dp_cp_group": groups.dp_cp,
    }


def sharded_tensors(
    module: MegatronModule, groups: ProcessGroupCollection
) -> Iterator[ShardedTensor]:
    """This rank's parts of the model's tensors; `.data` is a view onto the parameter."""
    described = module.sharded_state_dict(metadata=checkpoint_metadata(groups))
    apply_factories(described)
    for value in nested_values(described):
        if isinstance(value, ShardedTensor) and value.data is not None:
            yield value


@torch.no_grad()
def fill(
    module: MegatronModule,
    groups: ProcessGroupCollection,
    draw: Callable[[str, tuple[int, ...]], Tensor],
    wanted: Callable[[str], bool] = lambda key: True,
) -> None:
    """Set every wanted tensor to its part of `draw(key, global shape)`.

    Args:
        draw: gives the full tensor, float32 on the CPU; the same on every rank.
        wanted: which keys to set.
    """
    for shard in sharded_tensors(module, groups):
        if wanted(shard.key):
            shard.data.copy_(draw(shard.key, shard.global_shape)[shard.global_slice()])


def mark_tensor_parallel(module: MegatronModule) -> None:
    """Say which weights are split over tensor ranks, so that the gradient norm counts each once.

    megatron-core marks them while it draws them; here they are drawn by name instead
    (`model.initialize`). Transformer Engine's layers mark their own.
    """
    for layer in module.modules():
        for kind, axis in SPLIT_AXIS.items():
            weight = layer._parameters.get("weight")
            if isinstance(layer, kind) and weight is not None:
                set_tensor_model_parallel_attributes(weight, True, axis, 1)
