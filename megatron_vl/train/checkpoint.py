"""Distributed checkpoints: what they hold, and how they are loaded.

A checkpoint is a folder `step_NNNNNN`, written by `checkpoint_save` beside itself and renamed when
every rank has finished, so a folder with a plain name is complete. Tensors are stored in global
shape by layout-free names and load at any layout. The optimizer state does so at a stage's end;
inside a stage each data rank stores its own part, which loads at the same tensor and pipeline ranks
alone (`engine.optimizer_state`). `state.json` holds what the loop needs to go on: step and data
cursor, as readable text, and the digest of every file.

Trust: the index is checked before torch unpickles it, and tensors are read weights-only; see
`engine.checkpoint_trust` for the one case that is not covered.
"""

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.engine import fake_quant, optimizer_state
from megatron_vl.engine.checkpoint_trust import check_index
from megatron_vl.engine.fp8_state import HISTORY_PREFIX
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.engine.sharding import checkpoint_metadata, sharded_tensors
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import Trainee

STATE_FILE = "state.json"
# Names of stored tensors that are no weights.
TRAINING_STATE = ("optimizer.", HISTORY_PREFIX, fake_quant.PREFIX)


@dataclass(frozen=True)
class LoopState:
    """Where a stage stands.

    Attributes:
        stage: name of the stage that wrote the checkpoint.
        step: optimizer steps done.
        data_cursor: packs consumed over all ranks.
        optimizer: the folder holds optimizer state.
        trainable: parts whose optimizer state it holds.
        parent: digest of the checkpoint the stage started from; empty for drawn weights.
        optimizer_layout: the tensor and pipeline ranks that can load the optimizer state; empty
            where any can.
        files: SHA-256 of every other file of the folder, by name; empty where it was not written by
            `checkpoint_save`.
    """

    stage: str
    step: int
    data_cursor: int
    optimizer: bool
    trainable: list[str]
    parent: str = ""
    optimizer_layout: dict[str, int] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict, compare=False, repr=False)


class CheckpointError(ValueError):
    """A checkpoint folder cannot be used, and why."""


def step_folder(checkpoints: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return checkpoints / f"step_{step:06d}"


def latest(checkpoints: Path) -> Path | None:
    """The complete checkpoint with the most steps, or None."""
    complete = [
        folder
        for folder in checkpoints.glob("step_*")
        if not folder.suffix and (folder / STATE_FILE).is_file()
    ]
    return max(complete, key=lambda folder: folder.name, default=None)


def read_state(folder: Path) -> LoopState:
    """The loop state of a checkpoint.

    Raises:
        CheckpointError: no complete checkpoint is there.
    """
    try:
        return LoopState(**json.loads((folder / STATE_FILE).read_text()))
    except (OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder} is no complete checkpoint ({error}); a complete one is a step_NNNNNN folder "
            f"that holds {STATE_FILE}"
        ) from error


def load_weights(
    folder: Path, module: VisionLanguageModel, groups: ProcessGroupCollection
) -> LoopState:
    """Load this rank's part of the weights, whatever layout wrote them.

    Raises:
        CheckpointError: the folder is incomplete or its tensors are not this model's.
    """
    state = read_state(folder)
    metadata = checkpoint_metadata(groups)
    _refuse_other_model(folder, module, groups)
    described = module.sharded_state_dict(metadata=metadata)
    # Objects are the linears' extra state, of which Transformer Engine alone reads any. Its norms
    # have some too, which a checkpoint of the torch layer spec does not hold: they start without.
    stored = _stored_objects(folder) if PLATFORM.has_transformer_engine else set()
    left = {
        name
        for name, value in described.items()
        if isinstance(value, ShardedObject) and value.unique_key not in stored
    }
    wanted = described.keys() - left
    loaded = _load({name: described[name] for name in described if name in wanted}, folder)
    module.load_state_dict({name: loaded[name] for name in wanted} | dict.fromkeys(left))
    return state


def _refuse_other_model(
    folder: Path, module: VisionLanguageModel, groups: ProcessGroupCollection
) -> None:
    """Compare names and shapes with what is stored, over all pipeline stages, before reading."""
    here = {shard.key: tuple(shard.global_shape) for shard in sharded_tensors(module, groups)}
    stages: list[dict[str, tuple[int, ...]]] = [{}] * groups.pp.size()
    torch.distributed.all_gather_object(stages, here, group=groups.pp)
    model = {name: shape for stage in stages for name, shape in stage.items()}
    stored = {
        name: tuple(entry.size)
        for name, entry in _tensor_entries(folder).items()
        if not name.startswith(TRAINING_STATE)
    }
    differing = sorted(
        name for name in model.keys() | stored.keys() if model.get(name) != stored.get(name)
    )
    if differing:
        name = differing[0]
        raise CheckpointError(
            f"{folder} does not fit this model: {len(differing)} tensors differ, the first is "
            f"{name}, {stored.get(name, 'absent')} there and {model.get(name, 'absent')} here; "
            "compare the model section of the stage that wrote it"
        )


def load_optimizer(folder: Path, trainee: Trainee) -> None:
    """Load the optimizer state that `save` wrote for the same trainable parts.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    state = read_state(folder)
    if not state.optimizer:
        raise CheckpointError(
            f"{folder} holds weights only; set checkpoint.optimizer=true in the stage that writes "
            "it, or carry.optimizer=false here"
        )
    here = layout_of(trainee.groups)
    if state.optimizer_layout and state.optimizer_layout != here:
        raise CheckpointError(
            f"{folder} was saved inside a stage: its optimizer state loads at "
            f"{_spoken(state.optimizer_layout)} alone (any data and context ranks), this layout is "
            f"{_spoken(here)}; go on at that layout, which may be changed at the stage's end, or "
            "save with checkpoint.any_layout=true first"
        )
    tree: dict[str, Any] = _stored_history(folder, trainee)
    if trainee.learns:
        metadata = checkpoint_metadata(trainee.groups)
        tree["optimizer"] = optimizer_state.describe(
            trainee.optimizer,
            trainee.module.sharded_state_dict(metadata=metadata),
            metadata,
            any_layout=not state.optimizer_layout,
            is_loading=True,
        )
    loaded = _load(tree, folder)
    if trainee.learns:
        optimizer_state.load(trainee.optimizer, loaded["optimizer"])
    if trainee.fp8 is not None and trainee.fp8.history is not None:
        trainee.fp8.history.restore(loaded)


def load_calibration(folder: Path, trainee: Trainee) -> None:
    """Quantize a distillation's student by the calibration its checkpoint holds; of any other
    stage there is nothing to do.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    if trainee.distillation is not None:
        restore_calibration(folder, trainee.distillation.student)


def restore_calibration(folder: Path, student: fake_quant.FakeQuantized) -> None:
    """Quantize a student by the calibration a checkpoint holds.

    Raises:
        CheckpointError: the checkpoint holds none.
    """
    student.restore(_load(dict(student.sharded()), folder))


def layout_of(groups: ProcessGroupCollection) -> dict[str, int]:
    """What of a layout the optimizer state of a save inside a stage depends on."""
    return {"tensor": groups.tp.size(), "pipeline": groups.pp.size()}


def _spoken(layout: dict[str, int]) -> str:
    return ", ".join(f"parallel.{axis}={size}" for axis, size in layout.items())


def _stored_history(folder: Path, trainee: Trainee) -> dict[str, Any]:
    """What delayed scaling remembers, of the linears that had a history of this length when the
    checkpoint was written; after a change of precision or of `fp8`'s keys the others have none."""
    if trainee.fp8 is None or trainee.fp8.history is None:
        return {}
    stored = _tensor_entries(folder)
    return {
        name: shard
        for name, shard in trainee.fp8.history.sharded().items()
        if name in stored and tuple(stored[name].size) == tuple(shard.global_shape)
    }


def _load(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
    check_index(folder)
    with warnings.catch_warnings():
        # megatron-core's reader still names torch's older tensor-storage classes.
        warnings.filterwarnings("ignore", category=FutureWarning)
        try:
            return dist_checkpointing.load(tree, str(folder))
        except dist_checkpointing.core.CheckpointingException as error:
            raise CheckpointError(
                f"{folder} does not fit this model: {error}; compare the model section of the "
                "stage that wrote it"
            ) from error


def full_tensors(folder: Path, *, optimizer: bool = False) -> dict[str, Tensor]:
    """Every tensor of a checkpoint in full shape, on the host, by stored name.

    Needs no process group and no model.

    Args:
        optimizer: also the optimizer's, named `optimizer.state.KIND.PARAMETER` (in a save inside a
            stage `optimizer.distributed.GROUP.BUFFER.KIND`, flat), and the amax histories of
            fp8_delayed, named `fp8.amax_history.LAYER.LINEAR`.
    """
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint import load as dcp_load

    read_state(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _tensor_entries(folder).items()
        if optimizer or not name.startswith(TRAINING_STATE)
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp_load(tensors, storage_reader=FileSystemReader(str(folder)), no_dist=True)
    return tensors


def _tensor_entries(folder: Path) -> dict[str, Any]:
    """What the checkpoint says about each tensor it holds, by stored name."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    return {
        name: entry
        for name, entry in _entries(folder).items()
        if isinstance(entry, TensorStorageMetadata)
    }


def _stored_objects(folder: Path) -> set[str]:
    """Names of what the checkpoint holds that is no tensor."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    return {n for n, entry in _entries(folder).items() if isinstance(entry, BytesStorageMetadata)}


def _entries(folder: Path) -> dict[str, Any]:
    """Everything in the checkpoint's index, by stored name."""
    from torch.distributed.checkpoint import FileSystemReader

    check_index(folder)
    return FileSystemReader(str(folder)).read_metadata().state_dict_metadata
