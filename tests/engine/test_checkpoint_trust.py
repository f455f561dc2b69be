"""A checkpoint's index that would run code is refused before torch reads it."""

import os
import pickle
import shutil
from pathlib import Path

import pytest

from megatron_vl.engine.checkpoint_trust import (
    METADATA_FILE,
    UntrustedCheckpointError,
    check_index,
)
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import ShortRun


def checkpoint_of(run: ShortRun) -> Path:
    stage = RunFolder(run.path).stage("stage1")
    receipt = stage.receipt()
    assert receipt is not None
    return stage.checkpoint_path(receipt)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_a_written_checkpoint_passes(short_run: ShortRun) -> None:
    check_index(checkpoint_of(short_run))


def test_an_index_that_runs_code_is_refused_and_does_not_run(
    short_run: ShortRun, tmp_path: Path
) -> None:
    folder = tmp_path / "step_000003"
    shutil.copytree(checkpoint_of(short_run), folder)
    (folder / METADATA_FILE).write_bytes(pickle.dumps(Payload(tmp_path / "owned")))
    for read in (check_index, full_tensors):
        with pytest.raises(UntrustedCheckpointError, match="mkdir"):
            read(folder)
    assert not (tmp_path / "owned").exists()
