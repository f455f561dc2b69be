"""Keeps a checkpoint's index from running code.

The index of a distributed checkpoint, `.metadata`, is a pickle, and torch reads it as one. Before
that happens it is read here by an unpickler that knows only the classes such an index is made of
and refuses everything else. Tensors are read weights-only by torch; megatron-core's `common.pt`
too.

Not covered: Transformer Engine's extra state, which torch unpickles freely. It is asked for only
where Transformer Engine is installed; there, load folders you or your cluster wrote.
"""

import pickle
from pathlib import Path
from typing import Any

METADATA_FILE = ".metadata"
_PLANNER = "torch.distributed.checkpoint.planner"
_METADATA = "torch.distributed.checkpoint.metadata"
KNOWN_CLASSES = frozenset(
    {
        ("collections", "OrderedDict"),
        ("pathlib", "PosixPath"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    }
    | {("torch", f"{kind}{bits}") for kind in ("float", "int") for bits in (16, 32, 64)}
    | {("torch", name) for name in ("bfloat16", "int8", "uint8", "bool", "float8_e4m3fn")}
    | {("torch", "float8_e5m2")}
    | {(_PLANNER, name) for name in ("SavePlan", "TensorWriteData", "WriteItem", "WriteItemType")}
    | {
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    }
)


class UntrustedCheckpointError(ValueError):
    """A checkpoint's index asks for something that has no place in one."""


class _IndexUnpickler(pickle.Unpickler):
    def __init__(self, path: Path, file: Any) -> None:
        super().__init__(file)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN_CLASSES:
            raise UntrustedCheckpointError(
                f"{self._path} asks for {module}.{name}, which no checkpoint index needs; it was "
                "not written by this program, do not load it"
            )
        return super().find_class(module, name)


def check_index(folder: Path) -> None:
    """Refuse a checkpoint whose index would run code.

    Raises:
        UntrustedCheckpointError: the index names a class outside `KNOWN_CLASSES`.
        OSError, pickle.UnpicklingError: it cannot be read.
    """
    path = folder / METADATA_FILE
    with path.open("rb") as file:
        _IndexUnpickler(path, file).load()
