"""Samples of a prepared source, by key.

Energon serves storage: its index of each tar (`index.sqlite`) finds any member without reading the
others, and holds the sizes of the media. Order is not energon's business here: which sample comes
when is decided by `plan.py`.

Reads are thread-safe (a fresh file handle each) and take about 0.2 ms.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.energon.cache.file_store import WebdatasetFileStore
from megatron.energon.epathlib import EPath
from megatron.energon.flavors.webdataset.empty_dataset_error import EmptyDatasetError
from megatron.energon.flavors.webdataset.metadata import WebdatasetMeta, get_info_shard_files

from megatron_vl.data.chat import visual_parts
from megatron_vl.data.index import SPLITS
from megatron_vl.data.native import NativeRows


@dataclass(frozen=True)
class Sample:
    """One conversation.

    messages: v2 form; see `chat.py`.
    read_media: bytes of a medium by the name its part gives.
    """

    key: str
    source: str
    messages: list[dict[str, Any]]
    read_media: Callable[[str], bytes]

    def media(self) -> list[bytes]:
        """The encoded images and videos, in order."""
        return [self.read_media(part[part["type"]]) for part in visual_parts(self.messages)]


def missing_root(root: Path) -> FileNotFoundError:
    """The error of data that was never built."""
    return FileNotFoundError(
        f"no prepared data at {root}; make it with `mvl data prepare RECIPE`, for example "
        "`mvl data prepare stages/laptop`"
    )


class SourceStore:
    """One split of one source under a data root.

    Raises:
        FileNotFoundError: the root does not exist.
        ValueError: the root has no such source, or the source has no samples in the split.
    """

    def __init__(self, root: Path | str, source: str, split: str):
        root = Path(root)
        if not root.is_dir():
            raise missing_root(root)
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; there are {' and '.join(SPLITS)}")
        self.source, self.split, self.folder = source, split, root / source
        if not (self.folder / ".nv-meta" / "index.sqlite").is_file():
            found = sorted(path.parent.name for path in root.glob("*/.nv-meta"))
            raise ValueError(
                f"data.blend names {source!r}, which is no prepared source under {root}; "
                f"found: {', '.join(found) or 'none'}"
            )
        self._files = WebdatasetFileStore(EPath(self.folder))
        self._native = NativeRows(self.folder) if NativeRows.is_native(self.folder) else None
        self.keys: tuple[str, ...] = self._native.keys(split) if self._native else self._tar_keys()
        """Keys of the split, in the order of its shards."""
        if not self.keys:
            more = "; `mvl data convert --held-out 0.1` holds some out" if split == "val" else ""
            raise ValueError(f"{self.folder} has no samples in its {split} split{more}")

    def _tar_keys(self) -> tuple[str, ...]:
        path = EPath(self.folder)
        try:
            found = WebdatasetMeta.from_config(
                path=path, split_part=self.split, split_config="split.yaml"
            )
        except EmptyDatasetError:
            return ()
        chosen = {shard.name for shard in found.shards}
        shards = get_info_shard_files(path)
        return tuple(
            key for key, _, shard in self._files.list_all_samples() if shards[shard] in chosen
        )

    @property
    def identity(self) -> str:
        """Changes whenever the source is prepared again."""
        return (self.folder / ".nv-meta" / "index.uuid").read_text(encoding="utf-8").strip()

    def _read(self, name: str) -> bytes:
        try:
            return self._files[name][0]
        except KeyError:
            if self._native is None:
                raise
            return self._native.read_file(name)

    def sample(self, key: str) -> Sample:
        """The sample of a key.

        Raises:
            KeyError: no such key.
            ValueError: its row is no conversation.
        """
        if self._native is not None:
            cooked = self._native.messages(key, self._files.get_media_metadata)
            return Sample(key, self.source, cooked, self._read)
        row = json.loads(self._read(f"{key}.json"))
        messages = row.get("messages") if isinstance(row, dict) else None
        if not isinstance(messages, list) or not messages:
            raise ValueError(f"{self.folder}: {key}.json holds no list `messages`")
        return Sample(key, self.source, messages, self._read)

    def files_of(self, key: str) -> tuple[str, ...]:
        """Names of the files that stand beside a sample's row; none where rows lie elsewhere."""
        if self._native is not None:
            return ()
        names = (f"{key}.{part}" for part, _, _ in self._files.list_sample_parts(key))
        return tuple(name for name in names if name != f"{key}.json")

    def close(self) -> None:
        """Close the index."""
        self._files.close()


def open_sources(root: Path | str, sources: Sequence[str], split: str) -> dict[str, SourceStore]:
    """The stores of several sources. See `SourceStore` for what it raises."""
    return {source: SourceStore(root, source, split) for source in sources}
