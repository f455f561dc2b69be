"""A published folder of safetensors shards: opened, checked, and read tensor by tensor.

What it refuses: pickles and files that are cut off (`safetensors_file`), an index that cannot be
read, names a shard the folder lacks or places a tensor in another file than the one that holds it,
two files that hold one name, and, where the folder records hashes, a tensor that has changed.
What it costs: the headers when opened; each tensor when read.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.names import Constant
from checkpoint_tools.safetensors_file import (
    SUFFIX,
    Entry,
    TensorSpec,
    read_entry,
    read_header,
    unique_keys,
)
from checkpoint_tools.streaming import Record

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CHECKSUMS_FILE = "checksums.json"
PUBLISHED_TOKENIZER = "tokenizer.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")


class PublishedFolder:
    """A folder as Hugging Face publishes one.

    Attributes:
        config: config.json.
        tensors: dtype and shape by name.
        sha256: recorded hash by name, empty where the folder records none.

    Raises:
        ConversionError: the folder is damaged or of another kind; says which file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_json(folder / CONFIG_FILE)
        self._entries = self._find()
        self.tensors = {name: entry.spec for name, (_, entry) in self._entries.items()}
        self.sha256 = self._recorded()

    def file_of(self, name: str) -> str:
        """The shard that holds a tensor."""
        return self._entries[name][0]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape by name."""
        return {name: spec.shape for name, spec in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor."""
        file, entry = self._entries[name]
        return read_entry(self.folder / file, entry)

    def check_constants(self, constants: tuple[Constant, ...]) -> None:
        """Raise ConversionError where a tensor this model has no parameter for is not what it
        assumes."""
        for constant in constants:
            if constant.name not in self.tensors:
                continue
            found = self.read(constant.name)
            # Published in a narrower type, a constant is the rounded one.
            if not found.equal(constant.value.to(found.dtype)):
                raise ConversionError(
                    f"{self.folder}: {constant.name} is {found.flatten().tolist()[:4]}, this model "
                    f"is fixed to {constant.value.flatten().tolist()[:4]}"
                )

    def _find(self) -> dict[str, tuple[str, Entry]]:
        index = self.folder / INDEX_FILE
        if index.is_file():
            listed = read_json(index).get("weight_map")
            if not isinstance(listed, dict) or not listed:
                raise ConversionError(f"{index} holds no weight_map; it is cut off or edited")
            return self._follow(listed)
        if (self.folder / SINGLE_FILE).is_file():
            header = read_header(self.folder / SINGLE_FILE)
            return {name: (SINGLE_FILE, entry) for name, entry in header.items()}
        pickles = sorted(path.name for kind in _PICKLES for path in self.folder.glob(kind))
        hint = f"; {pickles[0]} is a pickle and is not opened" if pickles else ""
        raise ConversionError(
            f"{self.folder} holds neither {INDEX_FILE} nor {SINGLE_FILE}{hint}; publish its "
            "weights as safetensors"
        )

    def _follow(self, listed: Mapping[str, Any]) -> dict[str, tuple[str, Entry]]:
        """Where each listed tensor lies; index and shards must agree in both directions."""
        found: dict[str, tuple[str, Entry]] = {}
        for file in sorted(set(map(str, listed.values()))):
            if "/" in file or not file.endswith(SUFFIX):
                raise ConversionError(
                    f"{self.folder / INDEX_FILE} names {file!r}, which is no shard"
                )
            if not (self.folder / file).is_file():
                raise ConversionError(f"{self.folder / INDEX_FILE} names {file}, which is missing")
            for name, entry in read_header(self.folder / file).items():
                if listed.get(name) != file:
                    place = f"says {listed[name]}" if name in listed else "does not name it"
                    raise ConversionError(
                        f"{self.folder / file} holds {name}, but {INDEX_FILE} {place}: shards are "
                        "swapped, or the index belongs to another set"
                    )
                found[name] = (file, entry)
        for name, file in listed.items():
            if name not in found:
                raise ConversionError(
                    f"{INDEX_FILE} says that {file} holds {name}, but it does not: shards are "
                    f"swapped, or a tensor was dropped ({self.folder})"
                )
        return {name: found[name] for name in listed}

    def _recorded(self) -> dict[str, str]:
        path = self.folder / CHECKSUMS_FILE
        if not path.is_file():
            return {}
        recorded = read_json(path)["tensors"]
        hashes = {name: entry["sha256"] for name, entry in recorded.items()}
        if hashes.keys() != self.tensors.keys():
            odd = sorted(hashes.keys() ^ self.tensors.keys())
            raise ConversionError(
                f"{path} and the shards hold different tensors, the first is {odd[0]}: one was "
                "dropped or added"
            )
        return hashes


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; ConversionError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except OSError as error:
        raise ConversionError(f"{path} cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise ConversionError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path} holds no JSON object")
    return value


def shard_name(number: int, count: int) -> str:
    """Name of a published shard, numbered from 0 here and from 1 there."""
    return f"model-{number + 1:05d}-of-{count:05d}{SUFFIX}"


def index_text(records: Mapping[str, Record], specs: Mapping[str, TensorSpec]) -> str:
    """The index of a folder's shards."""
    size = sum(spec.num_bytes for spec in specs.values())
    weight_map = {name: file for file, record in records.items() for name in record}
    return json.dumps({"metadata": {"total_size": size}, "weight_map": weight_map}, indent=1) + "\n"
