"""Distributed checkpoints, read and written tensor by tensor: no process group, no model.

The format is torch.distributed.checkpoint's as megatron-core writes it: an index (`.metadata`, a
pickle), files of `torch.save` archives end to end, one a stored piece of a tensor, and two small
files of megatron-core's own. Tensors are in global shape whatever layout wrote them, so what is
written here loads at any.

Trust: the index goes through `engine.checkpoint_trust` first; pieces are read weights-only. The
optimizer's tensors and Transformer Engine's extra state are left alone.
"""

import json
import math
import pickle
import re
import zipfile
from collections.abc import Iterable, Mapping
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
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.tensor_bytes import FilePiece, Flusher, mapped_tensor
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
_UNREADABLE = (OSError, RuntimeError, EOFError, pickle.UnpicklingError, zipfile.BadZipFile)


class DistributedCheckpoint:
    """A checkpoint folder whose weights are read one at a time.

    Raises:
        ConversionError, UntrustedCheckpointError: the index is missing, damaged or not to be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
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
            piece = load_archive(path, info.offset, info.length)
        except _UNREADABLE as error:
            raise ConversionError(
                f"{path} cannot be read where {name} lies ({error}); it is damaged or cut off"
            ) from error
        if tuple(piece.shape) != tuple(chunk.sizes):
            raise ConversionError(
                f"{path}: {name} is {list(piece.shape)} there, the index says {list(chunk.sizes)}"
            )
        return piece


def load_archive(path: Path, offset: int, length: int) -> Tensor:
    """The tensor of one `torch.save` archive inside a file.

    Such an archive is a zip file whose members are not compressed; a contiguous tensor is mapped
    from where its numbers lie instead of being copied.
    """
    with FilePiece(path, offset, length) as piece:
        with zipfile.ZipFile(cast(IO[bytes], piece)) as archive:
            members = [m for m in archive.infolist() if "/data/" in m.filename]
        piece.seek(0)
        if len(members) == 1 and members[0].compress_type == zipfile.ZIP_STORED:
            with torch.serialization.skip_data():
                form = torch.load(cast(IO[bytes], piece), map_location="cpu", weights_only=True)
            if form.is_contiguous() and form.nbytes == members[0].file_size:
                # A member's numbers follow its 30-byte header, its name and its extra field.
                piece.seek(members[0].header_offset + 26)
                sizes = piece.read(4)
                skipped = 30 + sum(int.from_bytes(sizes[at : at + 2], "little") for at in (0, 2))
                start = offset + members[0].header_offset + skipped
                return mapped_tensor(path, start, form.dtype, tuple(form.shape))
        piece.seek(0)
        return torch.load(cast(IO[bytes], piece), map_location="cpu", weights_only=True)


class DistributedWriter:
    """Writes one file of a checkpoint.

    Args:
        path: the file, replaced if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._flusher = Flusher(self._file)

    def write(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Append one tensor; returns where it lies."""
        # A view would take its whole storage along.
        owned = tensor.untyped_storage().nbytes() == tensor.nbytes
        return self._append(tensor if owned else tensor.clone())

    def write_object(self, value: Any) -> dict[str, int]:
        """Append what is no tensor; returns where it lies."""
        return self._append(value)

    def _append(self, value: Any) -> dict[str, int]:
        offset = self._file.tell()
        torch.save(value, self._file)
        end = self._file.tell()
        self._flusher.written(end)
        return {"offset": offset, "length": end - offset}

    def finish(self) -> None:
        """Flush to disk and close."""
        self._flusher.close(flush=True)

    def close(self) -> None:
        """Close without more ado, after an error."""
        self._flusher.close(flush=False)


def write_index(
    folder: Path,
    tensors: Mapping[str, TensorSpec],
    places: Mapping[str, tuple[str, int, int]],
    objects_file: str,
) -> None:
    """Complete a checkpoint whose tensors are all written.

    Adds the empty extra state every linear layer has in a checkpoint of `train.checkpoint`, so
    that Transformer Engine's layers find what they ask for.

    Args:
        tensors: all stored tensors.
        places: file, offset and length of each.
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
    writer = DistributedWriter(folder / objects_file)
    for name in extra_state_names(tensors):
        entries[name] = BytesStorageMetadata()
        place = writer.write_object([None])
        storage[MetadataIndex(name)] = _StorageInfo(objects_file, place["offset"], place["length"])
    writer.finish()
    index = Metadata(entries, storage_data=storage, storage_meta=StorageMeta(modules=[]))
    with (folder / METADATA_FILE).open("wb") as file:
        pickle.dump(index, file)
    (folder / _CORE_FILE).write_text(json.dumps(_CORE))
    torch.save({}, folder / _COMMON_FILE)


def extra_state_names(tensors: Iterable[str]) -> list[str]:
    """Stored names of the extra state of every linear layer among the tensors."""
    found = (_HAS_EXTRA_STATE.match(name) for name in tensors)
    return [match[1] + _EXTRA_STATE for match in found if match]
