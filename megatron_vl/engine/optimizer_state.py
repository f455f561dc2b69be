"""Loads optimizer checkpoints where the optimizer is torch's AdamW.

megatron-core's distributed optimizer was written around fused optimizers. With torch's, three
things go wrong when a checkpoint is loaded, each handled here and covered by the resume test:

- it describes its state by looking at it, and AdamW has none before its first step;
- it copies every entry of that state from the checkpoint, but the step count is not stored there;
- it gives all parameters one shared step tensor, which AdamW then advances once a parameter.

Transformer Engine's and apex's optimizers pass through untouched.
"""

from typing import Any

import torch
from megatron.core.optimizer import ChainedOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    if isinstance(optimizer, ChainedOptimizer):
        return list(optimizer.chained_optimizers)
    return [optimizer]


def _is_torch_adam(part: Any) -> bool:
    return isinstance(part.optimizer, torch.optim.Adam | torch.optim.AdamW)


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


def load(optimizer: MegatronOptimizer, loaded: dict[str, Any]) -> None:
    """Take over what `sharded_state_dict(is_loading=True)` was filled with, but no settings: decay,
    betas and epsilon stay those the optimizer was made with.

    Args:
        loaded: the filled description; its parameter state is of the fully reshardable kind.
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
    moments = loaded["param_state"]
    part.load_state_dict({k: v for k, v in loaded.items() if not k.startswith("param_state")})
    states = list(part.optimizer.state.values())
    steps = [state.pop("step").clone() for state in states]
    part.load_parameter_state_from_fully_reshardable(moments)
    for state, step in zip(states, steps, strict=True):
        state["step"] = step
