"""Writes a torch_dist checkpoint from a thread, so that training goes on meanwhile.

What: `Write` stages this rank's tensors in host memory and writes them, with a SHA-256 of the file,
in a thread; when all ranks have written, `finalize` puts the index beside the files.
Why not megatron-core's own writers: they are processes. A manager is started in every rank (seconds
for the first save; a signal to the rank's process group ends it, and the rank with it) and writers
are forked from a process that has threads. A thread is none of that; plan and index stay
megatron-core's, so that any of its readers reads the result.
What it refuses: nothing; what a thread meets (a full disk) is raised by `finalize`, on all ranks.
What it costs: a copy of this rank's share of the checkpoint in host memory while it is written, and
one read of the file from the page cache for its digest.
"""

import contextlib
import errno
import hashlib
import io
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncRequest
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.state_dict_saver import (
    save_state_dict_async_finalize,
    save_state_dict_async_plan,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.api import WRAPPED_EXCEPTION, _wrap_exception
from torch.distributed.checkpoint.filesystem import (
    DEFAULT_SUFFIX,
    SerializationFormat,
    _write_item,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem, WriteItemType
from torch.distributed.checkpoint.storage import WriteResult


class WriteError(OSError):
    """A checkpoint could not be written; the message names rank, file and the system's reason."""


class _Stream(io.BufferedWriter):
    """A file that keeps the system's own error: torch's archive writer replaces it by another."""

    trouble: OSError | None = None

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.trouble = error
            raise


class ThreadWriter(FileSystemWriterAsync):
    """Stages and writes one file of a rank.

    Args:
        folder: where the files go.
        copies: the tensors may change before they are written, so copy them.
    """

    def __init__(self, folder: Path, *, copies: bool) -> None:
        super().__init__(str(folder), thread_count=1)
        self.digests: dict[str, str] = {}
        self._folder = folder
        self._copies = copies
        self._name = ""
        self._staged: list[tuple[WriteItem, Any]] = []
        self._results: list[WriteResult] = []
        self._error: Exception | None = None

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Copy what this rank writes to host memory. Called by megatron-core's planning."""
        self._name = f"{plan.storage_data.prefix}0{DEFAULT_SUFFIX}"
        for item in sorted(plan.items, key=lambda item: item.type is not WriteItemType.BYTE_IO):
            data = planner.resolve_data(item)
            self._staged.append((item, self._host(data) if isinstance(data, Tensor) else data))

    def _host(self, tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        if tensor.device.type != "cpu":
            return tensor.to("cpu")
        # torch.save writes the whole storage a view belongs to.
        view = tensor.untyped_storage().size() != tensor.numel() * tensor.itemsize
        return tensor.clone() if self._copies or view else tensor

    def write(self) -> None:
        """Write the file and digest it; an error is kept for `retrieve_write_results`."""
        try:
            if self._staged:
                path = self._folder / self._name
                with _Stream(path.open("wb", buffering=0)) as stream:
                    self._write(stream)
                self.digests[self._name] = digest_of(path)
        except Exception as error:
            self._error = error
        finally:
            self._staged.clear()

    def _write(self, stream: _Stream) -> None:
        try:
            for item, data in self._staged:
                result = _write_item(
                    self.transforms,
                    stream,
                    data,
                    item,
                    self._name,
                    serialization_format=SerializationFormat.TORCH_SAVE,
                )
                self._results.append(result)
            stream.flush()
            os.fsync(stream.fileno())
        except Exception as error:
            raise stream.trouble or error from error

    def retrieve_write_results(self) -> list[WriteResult] | WRAPPED_EXCEPTION:
        """What was written, or what went wrong. Called by megatron-core's finalization."""
        return self._results if self._error is None else _wrap_exception(self._error)


class _Strategy(TorchDistSaveShardedStrategy):
    """megatron-core's torch_dist strategy with another writer."""

    def __init__(self, *, copies: bool) -> None:
        super().__init__("torch_dist", 1)
        self._copies = copies
        self.writer: ThreadWriter | None = None

    def async_save(self, sharded_state_dict: Any, checkpoint_dir: Path) -> AsyncRequest:
        """Plan and stage; the request's function does the writing."""
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(
            sharded_state_dict, self.keep_only_main_replica
        )
        self.writer = ThreadWriter(Path(checkpoint_dir), copies=self._copies)
        planned, *_ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_key, False),
            self.writer,
            planner=MCoreSavePlanner(flatten_state_dict=False),
        )
        return AsyncRequest(
            self.writer.write, (), [lambda: save_state_dict_async_finalize(*planned)]
        )


class Write:
    """One checkpoint on its way to disk. All ranks make it, and all call `finalize`.

    Args:
        tree: the sharded state, as megatron-core describes it; free to change once this returns.
        folder: an empty folder that all ranks see.
        background: write in a thread and return at once; else return when this rank has written.
        validate: check over all ranks that every tensor is written exactly once.
    """

    def __init__(
        self, tree: dict[str, Any], folder: Path, *, background: bool, validate: bool
    ) -> None:
        self._folder = folder
        strategy = _Strategy(copies=background)
        with named_errors(folder):
            request = dist_checkpointing.save(
                tree,
                str(folder),
                sharded_strategy=strategy,
                validate_access_integrity=validate,
                async_sharded_save=True,
            )
        assert request is not None
        assert strategy.writer is not None
        self._writer, self._request = strategy.writer, request
        self._thread = threading.Thread(target=self._writer.write, name="checkpoint")
        if background:
            self._thread.start()
        else:
            self._writer.write()

    @property
    def writing(self) -> bool:
        """Whether this rank's file is still being written."""
        return self._thread.is_alive()

    def finalize(self) -> dict[str, str]:
        """Wait for all ranks and write the index.

        Returns:
            On rank 0 the SHA-256 of every file of the folder by name; elsewhere nothing.

        Raises:
            WriteError: a rank could not write its file.
        """
        if self._thread.ident is not None:
            self._thread.join()
        with named_errors(self._folder):
            for function in self._request.finalize_fns:
                function()
        first = torch.distributed.get_rank() == 0
        ranks: list[dict[str, str]] | None = None
        if first:
            ranks = [{}] * torch.distributed.get_world_size()
        torch.distributed.gather_object(self._writer.digests, ranks)
        if ranks is None:
            return {}
        written = {name: digest for one in ranks for name, digest in one.items()}
        others = {path.name for path in self._folder.iterdir()} - written.keys()
        return written | {name: digest_of(self._folder / name) for name in sorted(others)}


@contextlib.contextmanager
def named_errors(folder: Path) -> Iterator[None]:
    """Turn what a write to `folder` meets into a WriteError that says what to do."""
    try:
        yield
    except CheckpointException as error:
        # Raised on all ranks, but rank 0 alone is told which one failed, and how.
        told = ["; ".join(f"rank {rank}: {e}" for rank, (e, _) in error.failures.items())]
        torch.distributed.broadcast_object_list(told, src=0)
        raise _write_error(folder, told[0]) from error
    except (OSError, RuntimeError) as error:
        archive = any(mark in str(error) for mark in _ARCHIVE_MARKS)
        if isinstance(error, WriteError) or not (isinstance(error, OSError) or archive):
            raise
        full = archive and shutil.disk_usage(folder.parent).free < _LEAST_FREE
        reason = f"{os.strerror(errno.ENOSPC)} ({error})" if full else str(error)
        raise _write_error(folder, f"rank {torch.distributed.get_rank()}: {reason}") from error


# torch's archive writer says this, not why the system took no more bytes.
_ARCHIVE_MARKS = ("PytorchStreamWriter", "unexpected pos")
_LEAST_FREE = 1 << 20


def _write_error(folder: Path, reason: str) -> WriteError:
    return WriteError(
        f"{folder} could not be written: {reason}; the checkpoint before it is untouched, go on "
        "from it once the cause is mended"
    )


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
