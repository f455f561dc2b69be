"""Tensors as bytes: raw little-endian contents, their hashes, and pieces of a file."""

import hashlib
import io
import math
import mmap
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names a safetensors header uses."""

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    assert tensor.is_contiguous()
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def num_bytes(dtype: torch.dtype, shape: tuple[int, ...]) -> int:
    """Bytes of a dense tensor."""
    return math.prod(shape) * dtype.itemsize


def sha256(tensor: Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes, in hexadecimal."""
    return hashlib.sha256(raw(tensor)).hexdigest()


class FilePiece(io.RawIOBase):
    """A stretch of a file, read as a file of its own; several may be read one after another.

    Args:
        path: the file.
        offset, length: the stretch. [bytes]
    """

    def __init__(self, path: Path, offset: int, length: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._offset, self._length = offset, length
        self._file.seek(offset)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Always."""
        return True

    def tell(self) -> int:
        """Position inside the stretch."""
        return self._file.tell() - self._offset

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move inside the stretch; returns the new position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._length}[whence]
        self._file.seek(self._offset + start + offset)
        return start + offset

    def readinto(self, buffer: Any) -> int:
        """Fill `buffer` as far as the stretch goes; returns the bytes read."""
        room = memoryview(buffer)[: max(0, self._length - self.tell())]
        return self._file.readinto(room) or 0

    def close(self) -> None:
        """Close the file."""
        self._file.close()
        super().close()


def mapped_tensor(path: Path, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """A dense tensor whose numbers are the bytes of a file, read when they are used.

    The pages belong to the file, so they count as no memory of this process. Writing to the tensor
    does not reach the file.

    Raises:
        EOFError: the file ends before the tensor does.
    """
    size = num_bytes(dtype, shape)
    with path.open("rb") as file:
        missing = offset + size - os.fstat(file.fileno()).st_size
        if missing > 0:
            raise EOFError(f"{path} ends {missing} bytes early")
        if size == 0:
            return torch.empty(shape, dtype=dtype)
        before = offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(
            file.fileno(), before + size, access=mmap.ACCESS_COPY, offset=offset - before
        )
    flat = torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=before)
    return flat.view(dtype).reshape(shape)
