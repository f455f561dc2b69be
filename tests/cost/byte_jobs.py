"""What ranks do in the tests of bytes: count what a step really holds."""

from pathlib import Path

from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.cost.bytes import RankBytes, rank_bytes
from megatron_vl.train.step import count, train_step
from tests.support.gradients import batch
from tests.train.jobs import drawn


def held(file: Path, overrides: list[str]) -> tuple[RankBytes, RankBytes]:
    """Bytes of this rank as `cost` says, and as they are after one step."""
    config = load_stage(file, overrides)
    trainee = drawn(config)
    packs = batch(config, ["pictures"])
    train_step(packs, count(packs, trainee), trainee, config, 1e-3)
    weights = sum(size(parameter) for parameter in trainee.module.parameters())
    gradients = sum(size(buffer.grad_data) for buffer in trainee.wrapped.buffers)
    optimizer = trainee.optimizer
    inner = getattr(optimizer, "chained_optimizers", [optimizer])
    state = 0
    for part in inner:
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                moments = part.optimizer.state[parameter]
                state += sum(size(moments[key]) for key in ("exp_avg", "exp_avg_sq"))
                # In bfloat16 the optimizer steps a copy.
                state += size(parameter) * (config.precision.value == "bf16")
    return rank_bytes(config, trainee.groups.pp.rank()), RankBytes(weights, gradients, state)


def size(tensor: Tensor) -> int:
    """Bytes of its elements."""
    return tensor.numel() * tensor.element_size()
