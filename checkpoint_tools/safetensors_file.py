"""safetensors files, read and written tensor by tensor.

The library writes a file from tensors that are all in memory; here a shard is planned from shapes
alone, and each tensor is put in its place as it comes. Reading checks what the library
checks (a header that covers the file exactly) and says which file is wrong.

Refuses anything that is not such a file, pickles first of all: nothing here unpickles.
Source of the format: https://github.com/huggingface/safetensors.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.planned_file import FilePlan, PlannedFile
from checkpoint_tools.tensor_bytes import DTYPE_NAMES, DTYPES, mapped_tensor, num_bytes

SUFFIX = ".safetensors"
_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorSpec:
    """A tensor that is not there yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return num_bytes(self.dtype, self.shape)


@dataclass(frozen=True)
class Entry:
    """A tensor inside a file: `offset` counts from the file's first byte."""

    spec: TensorSpec
    offset: int


def header_bytes(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> bytes:
    """The header of a file whose tensors follow in this order, its length in front.

    Args:
        metadata: what the file says about itself besides its kind.
    """
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for name, spec in specs.items():
        entries[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.num_bytes],
        }
        offset += spec.num_bytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def read_metadata(path: Path) -> dict[str, str]:
    """What a file says about itself, empty where it says nothing; raises as `read_header`."""
    read_header(path)
    _, text = _header_text(path)
    return dict(json.loads(text).get("__metadata__", {}))


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of a JSON text. Raises ValueError where it names a key twice, which readers settle
    differently."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it names {twice} twice")
    return found


def _header_text(path: Path) -> tuple[bytes, bytes]:
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = int.from_bytes(start, "little")
        return start, file.read(length) if length <= _MOST_HEADER_BYTES else b""


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a file, in the order they lie.

    Raises:
        ConversionError: the file is no safetensors file, is cut off, names a tensor twice, or its
            header and its length disagree.
        OSError: it cannot be read.
    """
    size = path.stat().st_size
    start, text = _header_text(path)
    length = int.from_bytes(start, "little")
    if not text.startswith(b"{"):
        kind = (
            "a pickle or a torch.save archive" if start[:2] in (b"PK", b"\x80\x02") else "not one"
        )
        raise ConversionError(
            f"{path} should be a safetensors file and is {kind}; it was not opened any further. "
            "Convert it with the program that wrote it"
        )
    try:
        listed = json.loads(text, object_pairs_hook=unique_keys)
        listed.pop("__metadata__", None)
        entries = {
            name: Entry(
                TensorSpec(DTYPES[value["dtype"]], tuple(value["shape"])),
                _LENGTH_BYTES + length + value["data_offsets"][0],
            )
            for name, value in sorted(listed.items(), key=lambda item: item[1]["data_offsets"])
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConversionError(
            f"{path}: its header cannot be read ({error!r}); the file is damaged or cut off"
        ) from error
    end = _LENGTH_BYTES + length
    for name, entry in entries.items():
        if entry.offset != end:
            raise ConversionError(f"{path}: {name} does not lie where the tensor before it ends")
        end += entry.spec.num_bytes
    if end != size:
        raise ConversionError(f"{path} has {size} bytes, its header describes {end}: it is cut off")
    return entries


def read_entry(path: Path, entry: Entry) -> Tensor:
    """One tensor of a file whose header has been read."""
    return mapped_tensor(path, entry.offset, entry.spec.dtype, entry.spec.shape)


def plan_file(
    specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
) -> FilePlan:
    """A file of these tensors, in this order, its header in front.

    Args:
        metadata: see `header_bytes`.
    """
    header = header_bytes(specs, metadata)
    end = len(header)
    places: dict[str, tuple[int, int]] = {}
    for name, spec in specs.items():
        places[name] = (end, spec.num_bytes)
        end += spec.num_bytes
    return FilePlan(end, {0: header}, places)


class SafetensorsWriter(PlannedFile):
    """Writes one file; its tensors may come in any order.

    Args:
        path: the file, replaced if it is there.
        specs: every tensor, in the order they lie.
        metadata: see `header_bytes`.
    """

    def __init__(
        self,
        path: Path,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(path, plan_file(specs, metadata))
