"""Puts a rank where its stage begins: drawn, carried over, or gone on with.

Three cases, told apart by what is on disk and in the stage's `carry` section, never by guessing:
a checkpoint of this stage exists (go on from it), `carry.weights: previous` (take the parent's), or
`carry.weights: random` (draw them).
"""

from dataclasses import dataclass
from pathlib import Path

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import StageConfig, WeightSource
from megatron_vl.model.initialize import initialize
from megatron_vl.run.folder import RunFolder, StageFolder, require_done_parent
from megatron_vl.run.receipt import ParentRef
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.checkpoint import (
    CheckpointError,
    load_calibration,
    load_optimizer,
    load_weights,
    read_state,
)
from megatron_vl.train.checkpoint_check import usable_checkpoint
from megatron_vl.train.checkpoint_save import clear_unfinished
from megatron_vl.train.distill import calibrate, prepare_distillation


@dataclass(frozen=True)
class Start:
    """Where a stage begins.

    Attributes:
        trainee: the model with its starting weights, gradient buffers and optimizer.
        step: optimizer steps already done.
        data_cursor: packs already consumed, over all ranks.
        parent: the stage the weights came from.
        said: one line for the log.
    """

    trainee: Trainee
    step: int
    data_cursor: int
    parent: ParentRef | None
    said: str


def start_stage(
    config: StageConfig, run: RunFolder, stage: StageFolder, groups: ProcessGroupCollection
) -> Start:
    """Build the model and put the starting weights and optimizer state in place.

    Raises:
        ParentError: the stage takes weights over and its parent's receipt is not `done`.
        CheckpointError: a checkpoint does not hold what the stage asks of it.
    """
    module = build_model(config, groups)
    parent, source = _parent(config, run, stage)
    resumed, quarantined = usable_checkpoint(run, stage)
    if torch.distributed.get_rank() == 0:
        clear_unfinished(stage.checkpoints)
    if resumed is not None:
        _refuse_other_parent(resumed, parent)
        state = load_weights(resumed, module, groups)
        trainee = prepare_training(module, config, groups)
        if state.optimizer or state.step < config.train.steps:
            load_optimizer(resumed, trainee)
        prepare_distillation(trainee, config, source)
        load_calibration(resumed, trainee)
        said = "; ".join([*quarantined, f"goes on after step {state.step}, from {resumed.name}"])
        return Start(trainee, state.step, state.data_cursor, parent, said)
    if source is None:
        initialize(module, groups, config.model, config.train.seed)
        trainee = prepare_training(module, config, groups)
        said = "; ".join([*quarantined, f"starts from weights drawn with seed {config.train.seed}"])
        return Start(trainee, 0, 0, parent, said)
    state = load_weights(source, module, groups)
    if config.carry.fresh:
        initialize(module, groups, config.model, config.train.seed, frozenset(config.carry.fresh))
    trainee = prepare_training(module, config, groups)
    if config.carry.optimizer:
        _carry_optimizer(source, trainee, config)
    prepare_distillation(trainee, config, source)
    cursor = state.data_cursor if config.carry.data_cursor else 0
    fresh = ", ".join(part.value for part in config.carry.fresh)
    drawn = f", {fresh} drawn anew" if fresh else ""
    begins = f"starts from {state.stage} step {state.step}{drawn}"
    said = "; ".join([*quarantined, begins, *calibrate(trainee, config, cursor=cursor)])
    return Start(trainee, 0, cursor, parent, said)


def _parent(
    config: StageConfig, run: RunFolder, stage: StageFolder
) -> tuple[ParentRef | None, Path | None]:
    """The parent as the receipt names it, and its checkpoint; none for drawn weights."""
    if config.carry.weights is WeightSource.random:
        return None, None
    # The launcher has compared the digest before it started the ranks.
    receipt = require_done_parent(run, stage, digest=None)
    folder = run.parent(stage)
    assert folder is not None
    assert receipt.checkpoint is not None
    return (
        ParentRef(stage=receipt.stage, digest=receipt.checkpoint.digest),
        folder.checkpoint_path(receipt),
    )


def _refuse_other_parent(resumed: Path, parent: ParentRef | None) -> None:
    came_from = read_state(resumed).parent
    if came_from != (parent.digest if parent else ""):
        raise CheckpointError(
            f"{resumed} was trained from another checkpoint than the one the stage before it has "
            f"now; move {resumed.parent} away to start this stage anew"
        )


def _carry_optimizer(source: Path, trainee: Trainee, config: StageConfig) -> None:
    before = set(read_state(source).trainable)
    now = {part.value for part in config.train.trainable}
    if before != now:
        raise CheckpointError(
            f"carry.optimizer=true needs the trainable parts of the stage before: it trained "
            f"{', '.join(sorted(before))}, this one trains {', '.join(sorted(now))}; set "
            "carry.optimizer=false"
        )
    load_optimizer(source, trainee)
