"""One attempt at a stage, from the gate on its parent to the receipt a trainer could not write.

The supervisor of the local site and the books of a Slurm job both go through here, so that what a
run folder says does not depend on where it ran.

Refuses: to start a stage whose parent is not done, whose parent's checkpoint has changed, or whose
parent's receipt states something else than it did when the parent ended.
"""

import dataclasses
import hashlib
import json
import shutil
from typing import Any

from launch.gates import settle_gate
from megatron_vl.config.load import config_hash
from megatron_vl.config.recipe import kind_of, load_work
from megatron_vl.config.schema import StageConfig, WeightSource
from megatron_vl.config.schema_node import AssembleNode, Work
from megatron_vl.run.folder import (
    NotTakenError,
    ParentError,
    RunFolder,
    StageFolder,
    require_done_parent,
)
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.run.receipt import RERUN, Receipt, ReceiptError, Status, now
from megatron_vl.run.versions import versions

Events = list[dict[str, Any]]


def needs_parent(work: Work) -> bool:
    """Whether a stage or node takes anything over from the one before it."""
    if not isinstance(work, StageConfig):
        return not isinstance(work, AssembleNode)
    carry = work.carry
    return carry.weights is WeightSource.previous or carry.optimizer or carry.data_cursor


def counts(run: RunFolder, stage: StageFolder) -> bool:
    """Whether a stage is done, so that nobody runs it again.

    An evaluation or a release is done for the checkpoints and settings it ran with alone.
    """
    receipt = stage.receipt()
    if receipt is None or not receipt.done:
        return False
    if receipt.kind not in RERUN:
        return True
    if receipt.config_hash != config_hash(load_work(stage.work_path)):
        return False
    now_there = {source.name: source.receipt() for source in run.sources(stage).values()}
    digests = {
        name: found.checkpoint.digest
        for name, found in now_there.items()
        if found is not None and found.checkpoint is not None
    }
    return receipt.inputs == digests


def begin_attempt(run: RunFolder, stage: StageFolder, work: Work) -> int:
    """Check the parent and make the folder of the next attempt; returns its number.

    Raises ParentError or ReceiptError when the stage must not start; no attempt is then made.
    """
    if needs_parent(work):
        before = [*run.waits_for(stage), *run.sources(stage).values()]
        try:
            for one in {one.name: one for one in before}.values():
                settle_gate(run, one)
            require_done_parent(run, stage)
            for one in before:
                _refuse_edited(run, one)
        except (ParentError, ReceiptError) as error:
            decision = "not taken" if isinstance(error, NotTakenError) else "hold"
            run.journal.append("gated", stage=stage.name, decision=decision, reason=str(error))
            raise
    attempt = stage.start_attempt()
    shutil.copyfile(stage.work_path, stage.attempt_path(attempt) / stage.work_path.name)
    return attempt


def statement(receipt: Receipt) -> str:
    """A digest of what the trainer alone knows: the step, the checkpoint, where it came from.

    It goes into the journal when an attempt ends. A gate's verdict, a status that a person overrode
    and accounts of time may change later and are left out.
    """
    told = dataclasses.asdict(receipt)
    keys = ("stage", "step", "checkpoint", "parent", "config_hash", "data_cursor", "trainable")
    text = json.dumps({key: told[key] for key in keys}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _refuse_edited(run: RunFolder, stage: StageFolder) -> None:
    """Compare a receipt with the journal, where that has seen the stage end. Raises ParentError."""
    receipt = stage.receipt()
    assert receipt is not None
    told = [
        event["statement"]
        for event in run.journal.read()
        if (event["event"], event["stage"]) == ("ended", receipt.stage)
        and event["attempt"] == receipt.attempts
        and "statement" in event
    ]
    if told and told[-1] != (found := statement(receipt)):
        raise ParentError(
            f"the receipt of {receipt.stage} has been edited: the digest of what it states is "
            f"{found[:12]}..., the journal has {told[-1][:12]}... from when the stage ended. "
            f"Restore it, or run {receipt.stage} again"
        )


def write_own_receipt(
    run: RunFolder,
    stage: StageFolder,
    work: Work,
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
        config_hash=config_hash(work),
        data_cursor=None,
        trainable=trainable(work),
        kind=kind_of(work),
        started=started,
        ended=now(),
        seconds=dataclasses.replace(seconds, lost=seconds.lost + lost),
        versions=versions(),
    )
    stage.write_receipt(receipt)
    return receipt


def trainable(work: Work) -> list[str]:
    """The parts a stage trains; none for a node."""
    if not isinstance(work, StageConfig):
        return []
    return [part.name for part in work.train.trainable]


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
