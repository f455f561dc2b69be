"""A file whose every offset is known before its contents are.

Sizes follow from dtypes and shapes, so tensors are written where they belong, by several threads
and in any order, and whatever frames them is written first. A tensor goes block by block: a block
is hashed and written while the cache holds it, which reads memory once.

Flushes to disk begin while the file grows, so that its end waits less.
"""

import hashlib
import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from checkpoint_tools.tensor_bytes import raw

_BLOCK_BYTES = 1 << 20
_FLUSH_BYTES = 64 << 20
"""Bytes written between two background flushes."""


@dataclass(frozen=True)
class FilePlan:
    """Where everything lies in a file.

    Attributes:
        size: of the whole file. [bytes]
        frame: what is no tensor's contents, by offset.
        places: offset and length of each tensor's contents, in order. [bytes]
    """

    size: int
    frame: Mapping[int, bytes]
    places: Mapping[str, tuple[int, int]]

    def frame_stands(self, path: Path) -> bool:
        """Whether a file has the planned size and frame."""
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == self.size and all(
                os.pread(file.fileno(), len(data), offset) == data
                for offset, data in self.frame.items()
            )


class PlannedFile:
    """Writes one file.

    Args:
        path: the file, replaced if it is there.
        plan: of all its contents.
    """

    def __init__(self, path: Path, plan: FilePlan) -> None:
        self._file = path.open("wb", buffering=0)
        self._waiting = dict(plan.places)
        self._flushes = ThreadPoolExecutor(1)
        self._flush: Future[None] | None = None
        self._unflushed = 0
        self._lock = threading.Lock()
        for offset, data in plan.frame.items():
            self._write_at(offset, memoryview(data))

    def write(self, name: str, tensor: Tensor) -> str:
        """Write one contiguous tensor of the plan, from any thread; returns its SHA-256."""
        offset, length = self._waiting.pop(name)
        contents, digest = raw(tensor), hashlib.sha256()
        assert len(contents) == length, name
        for start in range(0, length, _BLOCK_BYTES):
            block = contents[start : start + _BLOCK_BYTES]
            digest.update(block)
            self._write_at(offset + start, block)
        return digest.hexdigest()

    def _write_at(self, offset: int, block: memoryview) -> None:
        done = 0
        while done < len(block):
            done += os.pwrite(self._file.fileno(), block[done:], offset + done)
        with self._lock:
            self._unflushed += len(block)
            if self._unflushed >= _FLUSH_BYTES and (self._flush is None or self._flush.done()):
                self._check_flush()
                self._unflushed = 0
                self._flush = self._flushes.submit(os.fsync, self._file.fileno())

    def _check_flush(self) -> None:
        """Raise the last background flush's error: the system tells each one once."""
        if self._flush is not None:
            self._flush.result()

    def finish(self) -> None:
        """Flush to disk and close; every tensor must be written."""
        assert not self._waiting, sorted(self._waiting)
        self._check_flush()
        self._flushes.shutdown()
        os.fsync(self._file.fileno())
        self._file.close()

    def close(self) -> None:
        """Close without more ado; nothing happens where the file is finished."""
        self._flushes.shutdown()
        self._file.close()
