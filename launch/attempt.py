"""One attempt at a stage, from the gate on its parent to the receipt a trainer could not write.

The supervisor of the local site and the books of a Slurm job both go through here, so that what a
run folder says does not depend on where it ran.

Refuses: to start a stage whose parent is not done or whose parent's checkpoint has changed.
"""

import dataclasses
import shutil
from typing import Any

from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import StageConfig, WeightSource
from megatron_vl.run.folder import ParentError, RunFolder, StageFolder, require_done_parent
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.run.receipt import Receipt, Status, now
from megatron_vl.run.versions import versions

Events = list[dict[str, Any]]


def needs_parent(config: StageConfig) -> bool:
    """Whether a stage takes anything over from the one before it."""
    carry = config.carry
    return carry.weights is WeightSource.previous or carry.optimizer or carry.data_cursor


def begin_attempt(run: RunFolder, stage: StageFolder, config: StageConfig) -> int:
    """Check the parent and make the folder of the next attempt; returns its number.

    Raises ParentError when the stage must not start; no attempt is then made.
    """
    if needs_parent(config):
        try:
            require_done_parent(run, stage)
        except ParentError as error:
            run.journal.append("gated", stage=stage.name, decision="hold", reason=str(error))
            raise
    attempt = stage.start_attempt()
    shutil.copyfile(stage.config_path, stage.attempt_path(attempt) / "config.yaml")
    return attempt


def write_own_receipt(
    run: RunFolder,
    stage: StageFolder,
    config: StageConfig,
    status: Status,
    reason: str,
    *,
    started: str,
    lost: float,
) -> Receipt:
    """Write the receipt of an attempt whose trainer left none: no checkpoint, all its time lost.

    Args:
        started: when the attempt began, as `receipt.now` writes it.
        lost: seconds since then.
    """
    attempt = stage.last_attempt()
    seconds = stage.seconds_before(attempt)
    steps = [line["step"] for line in step_lines(read_metrics(stage.metrics_path))]
    receipt = Receipt(
        run=run.name,
        stage=stage.name,
        status=status,
        reason=reason,
        step=max(steps, default=0),
        attempts=attempt,
        checkpoint=None,
        parent=None,
        config_hash=config_hash(config),
        data_cursor=None,
        trainable=[part.name for part in config.train.trainable],
        started=started,
        ended=now(),
        seconds=dataclasses.replace(seconds, lost=seconds.lost + lost),
        versions=versions(),
    )
    stage.write_receipt(receipt)
    return receipt


def saved_step(events: Events, stage: str, before_attempt: int | None = None) -> int:
    """The last step a stage has saved, by its journal; 0 before any. `before_attempt` looks at
    earlier attempts alone."""
    steps = [
        event["step"]
        for event in events
        if event["event"] == "saved"
        and event["stage"] == stage
        and (before_attempt is None or event["attempt"] < before_attempt)
    ]
    return max(steps, default=0)
