"""How optimizer state is described in a checkpoint and taken out of one again.

Two kinds. `any_layout` (megatron-core's fully_reshardable) is stored by parameter, in its shape,
and loads at every layout; saving it gathers all of the state over the data ranks. Otherwise
(megatron-core's dp_reshardable) each data rank stores the part it holds, without a message: it
loads at other numbers of data and context ranks, but at the same tensor and pipeline ranks alone.

megatron-core's distributed optimizer was written around fused optimizers. With torch's AdamW, three
things go wrong when a checkpoint is loaded, each handled here and covered by the resume tests:

- it describes its state by looking at it, and AdamW has none before its first step;
- it copies every entry of that state from the checkpoint, but the step count is not stored there;
- it gives all parameters one shared step tensor, which AdamW then advances once a parameter.

And two with parts: megatron-core stores small facts about them as pickles that only an unrestricted
unpickler reads, which are left out or stored as plain values; and the gaps between parameters hold
whatever the memory held, which is set to zero.

Transformer Engine's and apex's optimizers pass through untouched.
"""

from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import (
    LocalNonpersistentObject,
    ShardedObject,
    ShardedTensor,
)
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_vl.engine.sharding import CheckpointMetadata

LEAST_PART = 128
"""Elements a data rank holds at least for its part to be describable: buffers are padded to this
much a rank, and megatron-core cannot describe a part that is nothing but padding."""


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


def describe(
    optimizer: MegatronOptimizer,
    model_state: dict[str, Any],
    metadata: CheckpointMetadata,
    *,
    any_layout: bool,
    is_loading: bool = False,
) -> dict[str, Any]:
    """The optimizer's state as sharded tensors, to be saved or to be filled.

    Args:
        model_state: the model's `sharded_state_dict`.
        metadata: see `sharding.checkpoint_metadata`.
        any_layout: the kind; when loading, the one that was saved.
    """
    if is_loading:
        allocate(optimizer)
    if any_layout:
        return optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    assert len(_parts(optimizer)) == 1, "one distributed optimizer, as there are no experts"
    metadata = metadata | {"distrib_optim_sharding_type": "dp_reshardable"}
    described = optimizer.sharded_state_dict(model_state, is_loading=is_loading, metadata=metadata)
    plain = {
        key: value.data if isinstance(value, ShardedObject) else value
        for key, value in described.items()
    }
    buffers = {
        key: buckets for key, buckets in described["param_state"].items() if isinstance(key, int)
    }
    _clear_gaps(buffers)
    return plain | {"param_state": buffers}


def _clear_gaps(buffers: dict[int, dict[Any, list[list[dict[str, Any]]]]]) -> None:
    for by_dtype in buffers.values():
        for buckets in by_dtype.values():
            for piece in (piece for bucket in buckets for piece in bucket):
                gap = piece["padding"]
                assert isinstance(gap, LocalNonpersistentObject)
                if gap.unwrap():
                    for value in piece.values():
                        if isinstance(value, ShardedTensor):
                            value.data.zero_()


def allocate(optimizer: MegatronOptimizer) -> None:
    """Give every parameter of a torch AdamW its (zero) state, if it has none yet."""
    for part in filter(_is_torch_adam, _parts(optimizer)):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                if not part.optimizer.state[parameter]:
                    part.optimizer.state[parameter] = {
                        "step": torch.zeros((), dtype=torch.float32),
                        "exp_avg": torch.zeros_like(parameter),
                        "exp_avg_sq": torch.zeros_like(parameter),
                    }


# What a stage's config says, whatever the checkpoint's stage said.
SETTINGS = ("lr", "max_lr", "min_lr", "weight_decay", "betas", "eps")


@torch.no_grad()  # in float32 the main parameters are views of the model's
def load(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what `describe(is_loading=True)` was filled with, but no settings: decay, betas and
    epsilon stay those the optimizer was made with.

    Args:
        loaded: the filled description, of either kind.
    """
    own = [{key: group[key] for key in SETTINGS} for group in optimizer.param_groups]
    _load_state(optimizer, loaded)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def _load_state(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    parts = _parts(optimizer)
    if len(parts) != 1 or not _is_torch_adam(parts[0]):
        optimizer.load_state_dict(loaded)
        return
    part = parts[0]
    part.load_state_dict({k: v for k, v in loaded.items() if not k.startswith("param_state")})
    states = list(part.optimizer.state.values())
    steps = [state.pop("step").clone() for state in states]
    if loaded["param_state_sharding_type"] == "dp_reshardable":
        part.load_parameter_state_from_dp_reshardable(loaded["param_state"])
    else:
        part.load_parameter_state_from_fully_reshardable(loaded["param_state"])
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
