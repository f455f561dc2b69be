"""The learning rate of a step: linear warm-up, cosine decay. A pure function, so that a resumed
run needs no schedule state."""

import math

from megatron_vl.config.schema import OptimizerConfig


def learning_rate(optimizer: OptimizerConfig, step: int, steps: int) -> float:
    """Learning rate of 0-based `step` out of `steps`.

    Warm-up reaches the peak at its last step; the decay reaches `min_lr` at the stage's last step.
    """
    warmup = round(optimizer.warmup_fraction * steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    progress = (step - warmup + 1) / max(steps - warmup, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * cosine
