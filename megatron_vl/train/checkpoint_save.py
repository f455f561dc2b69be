"""Saves a stage's state, beside training: staged in host memory, written by a thread, then renamed.

`step_NNNNNN.TOKEN.partial` becomes `step_NNNNNN` when every rank's file is on disk, the index is
written and `state.json`, the marker, stands beside it with the digest of every file. So a folder
with a plain name is complete whenever a kill falls, and the checkpoint before it is untouched until
then.
The token differs from save to save: an attempt whose ranks outlive their supervisor for a moment
does not write into the folder of the attempt after it.

All ranks call `begin` and `end` at the same steps. At most one save is under way; a save that is
due while another is written waits for it.
"""

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from megatron_vl.engine import optimizer_state
from megatron_vl.engine.checkpoint_writer import Write, WriteError, named_errors
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.engine.sharding import checkpoint_metadata
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.train.build import Trainee
from megatron_vl.train.checkpoint import STATE_FILE, LoopState, layout_of, read_state

PARTIAL_SUFFIX = ".partial"
"""Of a folder that is being written."""
REPLACED_SUFFIX = ".replaced"
"""Of a folder that another has just taken the place of, on its way out."""


@dataclass(frozen=True)
class Saved:
    """A save that is complete.

    Attributes:
        folder: the checkpoint.
        state: what was saved.
        seconds: from its beginning until it was complete.
        stall_seconds: of them, those in which this rank could not train.
    """

    folder: Path
    state: LoopState
    seconds: float
    stall_seconds: float


class Saver:
    """Writes the checkpoints of one trainee, one at a time. All ranks make one.

    Args:
        background: train on while a save is written.
        any_layout: the optimizer state of every save loads at any layout.
    """

    def __init__(
        self, trainee: Trainee, *, background: bool = False, any_layout: bool = False
    ) -> None:
        self._trainee = trainee
        self._background = background
        self._any_layout = any_layout or not _parts_are_describable(trainee)
        self._validated: set[bool] = set()
        self._write: Write | None = None
        self._pending: tuple[Path, LoopState] | None = None
        self._partial = Path()
        self._began = self._stalled = 0.0

    @property
    def under_way(self) -> Path | None:
        """The checkpoint that is being written; the same on all ranks."""
        return self._pending[0] if self._pending else None

    @property
    def writing(self) -> bool:
        """Whether this rank's part is still being written; `end` would wait for it."""
        return self._write is not None and self._write.writing

    def begin(self, folder: Path, state: LoopState, *, last: bool = False) -> None:
        """Start a save; the weights may change as soon as this returns.

        Args:
            folder: final place; a folder of that name with another state is replaced.
            state: `state.optimizer` says whether the optimizer state goes in.
            last: the stage ends here: its optimizer state must load at any layout.
        """
        assert self._pending is None, self._pending
        any_layout = last or self._any_layout
        self._began = time.perf_counter()
        if state.optimizer and not any_layout:
            state = replace(state, optimizer_layout=layout_of(self._trainee.groups))
        self._pending = (folder, state)
        # A complete checkpoint of the same state is kept as it is: a stage that was cut off between
        # its last save and its receipt comes by here again.
        if not ((folder / STATE_FILE).is_file() and read_state(folder) == state):
            self._partial = _make_partial(folder)
            self._write = Write(
                self._tree(state, any_layout),
                self._partial,
                background=self._background,
                # What is written does not change from save to save, so one check is enough.
                validate=any_layout not in self._validated,
            )
            self._validated.add(any_layout)
        self._stalled = time.perf_counter() - self._began

    def end(self, may_write: Callable[[], None] = lambda: None) -> Saved:
        """Wait until every rank has written, and make the checkpoint valid.

        Args:
            may_write: raises when somebody else has taken over the stage.

        Raises:
            WriteError: a rank could not write; nothing but the unfinished folder is lost.
        """
        assert self._pending is not None
        folder, state = self._pending
        resumed, first = time.perf_counter(), torch.distributed.get_rank() == 0
        if self._write is not None:
            try:
                files = self._write.finalize()
                may_write()
                with named_errors(folder):
                    if first:
                        _publish(self._partial, folder, replace(state, files=files))
            except WriteError:
                if first:
                    shutil.rmtree(self._partial, ignore_errors=True)
                raise
            finally:
                self._write = self._pending = None
            torch.distributed.barrier()
        self._pending = None
        ended = time.perf_counter()
        stalled = self._stalled + ended - resumed
        return Saved(folder, state, ended - self._began, stalled)

    def _tree(self, state: LoopState, any_layout: bool) -> dict[str, Any]:
        trainee = self._trainee
        metadata = checkpoint_metadata(trainee.groups)
        model_state = trainee.module.sharded_state_dict(metadata=metadata)
        tree: dict[str, Any] = dict(model_state)
        if state.optimizer and trainee.learns:
            tree["optimizer"] = optimizer_state.describe(
                trainee.optimizer, model_state, metadata, any_layout=any_layout
            )
        if state.optimizer and trainee.fp8 is not None and trainee.fp8.history is not None:
            tree |= trainee.fp8.history.sharded()
        if trainee.distillation is not None:
            tree |= trainee.distillation.student.sharded()
        return tree


def save(folder: Path, trainee: Trainee, state: LoopState) -> None:
    """Write a checkpoint that loads at any layout; every rank calls it, all return when it is
    complete."""
    saver = Saver(trainee)
    saver.begin(folder, state, last=True)
    saver.end()


def longest_save(run: RunFolder, stage: StageFolder) -> float | None:
    """The longest save that earlier attempts at the stage measured; None when they made none."""
    seconds = [
        event["seconds"]
        for event in run.journal.read()
        if event["event"] == "saved" and event["stage"] == stage.name
    ]
    return max(seconds, default=None)


def clear_unfinished(checkpoints: Path) -> None:
    """Delete what saves that were cut off have left; one rank calls it, before any save."""
    for suffix in (PARTIAL_SUFFIX, REPLACED_SUFFIX):
        for folder in checkpoints.glob(f"step_*{suffix}"):
            shutil.rmtree(folder, ignore_errors=True)


def _parts_are_describable(trainee: Trainee) -> bool:
    """Whether every data rank holds enough for `optimizer_state` to describe its part."""
    learning = sum(trainee.trainable.values())
    fits = (
        not trainee.learns or learning >= optimizer_state.LEAST_PART * trainee.groups.dp_cp.size()
    )
    all_fit = torch.tensor(int(fits), device=PLATFORM.device)
    torch.distributed.all_reduce(all_fit, op=torch.distributed.ReduceOp.MIN)
    return bool(all_fit)


def _make_partial(folder: Path) -> Path:
    """An empty folder beside `folder` that no other save has, made by rank 0, told to all."""
    told: list[Path | None] = [None]
    if torch.distributed.get_rank() == 0:
        partial = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{PARTIAL_SUFFIX}")
        partial.mkdir(parents=True)
        told[0] = partial
    torch.distributed.broadcast_object_list(told, src=0)
    assert told[0] is not None
    return told[0]


def _publish(partial: Path, folder: Path, state: LoopState) -> None:
    """Mark the written folder complete and give it its name."""
    old = folder.with_name(folder.name + REPLACED_SUFFIX)
    for path in partial.iterdir():
        atomic.sync(path)
    atomic.write_text(partial / STATE_FILE, json.dumps(asdict(state), indent=1) + "\n")
    if folder.exists():
        # Deleting takes a while, and half a checkpoint must not keep its name meanwhile.
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(partial, folder)
    atomic.sync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)
