"""Distributed checkpoints, read and written tensor by tensor: no process group, no model.

The format is torch.distributed.checkpoint's as megatron-core writes it: an index (`.metadata`, a
pickle), files of `torch.save` archives end to end, one a stored piece of a tensor, and two small
files of megatron-core's own. Tensors are in global shape whatever layout wrote them, so what is
written here loads at any.

Trust: the index goes through `engine.checkpoint_trust` first; pieces are read weights-only. The
optimizer's tensors and Transformer Engine's extra state are left alone.
"""

import functools
import io
import json
import math
import pickle
import re
import struct
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.planned_file import FilePlan
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.tensor_bytes import FilePiece, mapped_tensor, num_bytes
from megatron_vl.engine.checkpoint_trust import METADATA_FILE, check_index
from megatron_vl.train.checkpoint import TRAINING_STATE

_EXTRA_STATE = "._extra_state/shard_0_1"
_HAS_EXTRA_STATE = re.compile(
    r"(.*\.(?:linear_qkv|linear_proj|linear_fc1|linear_fc2|in_proj|out_proj|embedder|output_layer))"
    r"\.weight(?:\.z)?$"
)
_CORE_FILE = "metadata.json"
_CORE = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_COMMON_FILE = "common.pt"
_LOCAL_HEADER_BYTES = 30
"""Of a zip member, before its name; the lengths of name and extra field are the last four."""
_UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


class DistributedCheckpoint:
    """A checkpoint folder whose weights are read one at a time.

    Raises:
        ConversionError, UntrustedCheckpointError: the index is missing, damaged or not to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._forms: dict[bytes, _Form] = {}
        try:
            check_index(folder)
            self._index = FileSystemReader(str(folder)).read_metadata()
        except (OSError, pickle.UnpicklingError, EOFError) as error:
            raise ConversionError(
                f"{folder} is no distributed checkpoint that can be read ({error}); one is a "
                f"step_NNNNNN folder that holds {METADATA_FILE}"
            ) from error
        self.stored = {
            name: TensorSpec(entry.properties.dtype, tuple(entry.size))
            for name, entry in self._index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self.tensors = {
            name: spec for name, spec in self.stored.items() if not name.startswith(TRAINING_STATE)
        }

    def read(self, name: str) -> Tensor:
        """One tensor in full shape.

        Raises:
            ConversionError: a file is missing or damaged there.
        """
        entry = self._index.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        held = sum(math.prod(tuple(chunk.sizes)) for chunk in entry.chunks)
        if held != entry.size.numel():
            raise ConversionError(
                f"{self.folder}: the index lists {held} of the {entry.size.numel()} numbers of "
                f"{name}; it is damaged"
            )
        pieces = [self._piece(name, chunk) for chunk in entry.chunks]
        if len(pieces) == 1 and pieces[0].shape == entry.size:
            return pieces[0].contiguous()
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for chunk, piece in zip(entry.chunks, pieces, strict=True):
            place = tuple(
                slice(start, start + size)
                for start, size in zip(chunk.offsets, chunk.sizes, strict=True)
            )
            whole[place] = piece
        return whole

    def _piece(self, name: str, chunk: ChunkStorageMetadata) -> Tensor:
        info = self._index.storage_data[MetadataIndex(name, chunk.offsets)]
        path = self.folder / info.relative_path
        try:
            piece = self._load_archive(path, info.offset, info.length)
        except _UNREADABLE as error:
            raise ConversionError(
                f"{path} cannot be read where {name} lies ({error}); it is damaged or cut off"
            ) from error
        if tuple(piece.shape) != tuple(chunk.sizes):
            raise ConversionError(
                f"{path}: {name} is {list(piece.shape)} there, the index says {list(chunk.sizes)}"
            )
        return piece

    def _load_archive(self, path: Path, offset: int, length: int) -> Tensor:
        """The tensor of one `torch.save` archive inside a file.

        Such an archive is a zip file whose members are not compressed, the pickle first; a
        contiguous tensor is mapped from where its numbers lie instead of being copied.
        """
        with FilePiece(path, offset, length) as piece:
            file = cast(IO[bytes], piece)
            with zipfile.ZipFile(file) as archive:
                first, *others = archive.infolist()
            data = [member for member in others if "/data/" in member.filename]
            pickle_first = first.filename.endswith("/data.pkl") and first.header_offset == 0
            if pickle_first and [m.compress_type for m in data] == [zipfile.ZIP_STORED]:
                piece.seek(0)
                # What precedes the numbers is the same for tensors of one type and shape.
                start = piece.read(data[0].header_offset + _LOCAL_HEADER_BYTES)
                form = self._forms.get(start)
                if form is None:
                    form = self._forms[start] = _form(file)
                if form.contiguous and num_bytes(form.dtype, form.shape) == data[0].file_size:
                    # A member's numbers follow its header, its name and its extra field.
                    sizes = struct.unpack("<HH", start[-4:])
                    return mapped_tensor(
                        path, offset + len(start) + sum(sizes), form.dtype, form.shape
                    )
            piece.seek(0)
            return torch.load(file, map_location="cpu", weights_only=True)


@dataclass(frozen=True)
class _Form:
    """What an archive says of its one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    contiguous: bool


def _form(archive: IO[bytes]) -> _Form:
    archive.seek(0)
    with torch.serialization.skip_data():
        tensor = torch.load(archive, map_location="cpu", weights_only=True)
    return _Form(tensor.dtype, tuple(tensor.shape), tensor.is_contiguous())


class _Frame(io.RawIOBase):
    """Takes what `torch.save` writes around a tensor's numbers, which it skips."""

    def __init__(self) -> None:
        self.parts = [b""]

    def write(self, data: Any) -> int:
        """Add to the current part."""
        self.parts[-1] += bytes(data)
        return len(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Begin the next part: this is how torch leaves room for numbers."""
        assert whence == io.SEEK_CUR
        self.parts.append(b"")
        return offset


@functools.cache
def _frame(spec: TensorSpec) -> tuple[bytes, bytes]:
    """What an archive of such a tensor holds before its numbers and after them.

    The checksum of the numbers (CRC-32) stays 0, as in what torch writes with
    `set_crc32_options(False)`: the frame is then known before the numbers are. torch does not look
    at it when it loads; SHA-256 of every tensor is recorded elsewhere.
    """
    frame = _Frame()
    with torch.serialization.skip_data():
        torch.save(torch.empty(spec.shape, dtype=spec.dtype), cast(IO[bytes], frame))
    before, *after = frame.parts
    return before, b"".join(after)


def archive_places(specs: Mapping[str, TensorSpec]) -> dict[str, tuple[int, int]]:
    """Offset and length of each tensor's archive in a file that holds them end to end. [bytes]"""
    places: dict[str, tuple[int, int]] = {}
    end = 0
    for name, spec in specs.items():
        length = sum(map(len, _frame(spec))) + spec.num_bytes
        places[name] = (end, length)
        end += length
    return places


def plan_file(specs: Mapping[str, TensorSpec]) -> FilePlan:
    """One file of a checkpoint: these tensors' archives, end to end."""
    frame: dict[int, bytes] = {}
    contents: dict[str, tuple[int, int]] = {}
    end = 0
    for name, (offset, length) in archive_places(specs).items():
        before, after = _frame(specs[name])
        start, end = offset + len(before), offset + length
        contents[name] = (start, specs[name].num_bytes)
        frame |= {offset: before, end - len(after): after}
    return FilePlan(end, frame, contents)


def write_index(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    places: Mapping[str, tuple[str, int, int]],
    objects_file: str,
) -> None:
    """Write all of a checkpoint but the files of its tensors, before or after those.

    Adds the empty extra state every linear layer has in a checkpoint of `train.checkpoint`, so
    that Transformer Engine's layers find what they ask for.

    Args:
        tensors: all stored tensors.
        places: file, offset and length of each one's archive.
        objects_file: name of the file that the extra state goes to.
    """
    entries: dict[str, Any] = {}
    storage: dict[Any, Any] = {}
    for name, spec in tensors.items():
        start = torch.Size([0] * len(spec.shape))
        entries[name] = TensorStorageMetadata(
            TensorProperties(dtype=spec.dtype),
            torch.Size(spec.shape),
            [ChunkStorageMetadata(start, torch.Size(spec.shape))],
        )
        storage[MetadataIndex(name, start)] = _StorageInfo(*places[name])
    empty = io.BytesIO()
    torch.save([None], empty)
    length = len(empty.getvalue())
    states = extra_state_names(tensors)
    for number, name in enumerate(states):
        entries[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(objects_file, number * length, length)
    (folder / objects_file).write_bytes(empty.getvalue() * len(states))
    index = Metadata(entries, storage_data=storage, storage_meta=StorageMeta(modules=[]))
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(index, file)
    (folder / _CORE_FILE).write_text(json.dumps(_CORE))
    torch.save({}, folder / _COMMON_FILE)


def extra_state_names(tensors: Iterable[str]) -> list[str]:
    """Stored names of the extra state of every linear layer among the tensors."""
    found = (_HAS_EXTRA_STATE.match(name) for name in tensors)
    return [match[1] + _EXTRA_STATE for match in found if match]
