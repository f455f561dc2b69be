"""What ranks do in the FP8 tests: a few steps under a drift meter, from drawn or loaded weights."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.train.build import Trainee
from megatron_vl.train.checkpoint import LoopState, read_state
from megatron_vl.train.checkpoint_save import save
from megatron_vl.train.drift import DriftMeter, DriftReport
from megatron_vl.train.schedule import learning_rate
from megatron_vl.train.step import count, train_step
from tests.train.jobs import drawn, loaded


@dataclass(frozen=True)
class Watched:
    """What a few steps gave on one rank.

    Attributes:
        places: linears in FP8 on this rank.
        history: what delayed scaling remembers, (steps, 3) by linear.
        digest: of all parameters' bytes afterwards.
        reports: of the steps that were measured.
    """

    losses: list[float]
    grad_norms: list[float]
    places: list[str]
    history: dict[str, Tensor]
    digest: str
    reports: list[DriftReport]


def train(
    file: Path,
    overrides: list[str],
    num_steps: int,
    *,
    source: Path | None = None,
    folder: Path | None = None,
    change: Callable[[Trainee], None] | None = None,
) -> Watched:
    """Train some steps.

    Args:
        source: a checkpoint to go on from; weights are drawn when None.
        folder: where to save afterwards, optimizer state included.
        change: done to the model before the first step.
    """
    config = load_stage(file, overrides)
    first = read_state(source).step if source else 0
    trainee = loaded(config, source) if source else drawn(config)
    if change is not None:
        change(trainee)
    losses, norms, reports = _steps(trainee, config, first, first + num_steps)
    if folder is not None:
        trainable = sorted(part.value for part in config.train.trainable)
        cursor = (first + num_steps) * config.train.global_batch
        save(folder, trainee, LoopState("stage1", first + num_steps, cursor, True, trainable))
    fp8 = trainee.fp8
    places = [str(place) for place in fp8.linears] if fp8 else []
    history = fp8.history if fp8 else None
    rows = history.history_WI3.unbind(1) if history else []
    remembered = dict(zip(places, rows, strict=False))
    return Watched(losses, norms, places, remembered, _digest(trainee), reports)


def _digest(trainee: Trainee) -> str:
    parts = (p.detach().view(torch.uint8).numpy() for p in trainee.module.parameters())
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()


def _steps(
    trainee: Trainee, config: StageConfig, first: int, last: int
) -> tuple[list[float], list[float], list[DriftReport]]:
    groups = trainee.groups
    meter = DriftMeter(config, trainee)
    cursor = first * config.train.global_batch
    loader = PackLoader(
        config, split="train", rank=groups.dp.rank(), size=groups.dp.size(), cursor=cursor
    )
    losses, norms, reports = [], [], []
    try:
        for step in range(first, last):
            packs = loader.next_batch()
            rate = learning_rate(config.optimizer, step, config.train.steps)
            with meter.watching(step + 1):
                result = train_step(packs, count(packs, trainee), trainee, config, rate)
            losses.append(result.loss)
            norms.append(result.grad_norm)
            report = meter.report(step + 1)
            reports += [report] if report else []
    finally:
        loader.close()
    return losses, norms, reports


def run(options: dict[str, object], file: Path, overrides: list[str], num_steps: int) -> Watched:
    """`train` with its keyword arguments as a dictionary, as a pool of ranks passes them."""
    return train(file, overrides, num_steps, **options)  # type: ignore[arg-type]
