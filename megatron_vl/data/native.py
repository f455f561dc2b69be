"""Rows of a source that was indexed where it lies (see `convert/native.py`).

A row is read from its jsonl file by place and brought to the internal form, the sizes of its media
taken from the index rather than from the row: the index knows turned images as they stand upright.
Media come from tars, which the store reads, or from plain files, read here. Imports no torch.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.convert.conversation import Draft, Fault, Medium
from megatron_vl.data.convert.media import MediaFinder
from megatron_vl.data.convert.parts import read_v2
from megatron_vl.data.convert.rows import parse
from megatron_vl.data.index import META

NATIVE = "native.json"
ROWS = "rows.npy"
MEDIA_FOLDER = "media"

ROW_FIELDS = 4
"""Of ROWS: row number, first byte, bytes, and 1 if held out."""


class NativeRows:
    """The kept rows of one source.

    Raises:
        ValueError: the file of the rows is gone or is not the one that was indexed.
    """

    def __init__(self, folder: Path):
        about = json.loads((folder / META / NATIVE).read_text(encoding="utf-8"))
        self._path = Path(about["rows"])
        self._name: str = about["source"]
        self._rows = np.load(folder / META / ROWS, mmap_mode="r")
        self._finder = MediaFinder([Path(root) for root in about["roots"]])
        try:
            status = self._path.stat()
        except OSError as error:
            raise ValueError(
                f"{folder} is an index of {self._path}, which cannot be read: {error.strerror}"
            ) from error
        if [status.st_size, status.st_mtime_ns] != [about["size"], about["mtime_ns"]]:
            raise ValueError(f"{self._path} has changed since {folder} was made; convert it again")

    @staticmethod
    def is_native(folder: Path) -> bool:
        """Whether a source is an index of rows elsewhere."""
        return (folder / META / NATIVE).is_file()

    def keys(self, split: str) -> tuple[str, ...]:
        """Keys of a split, in the order of the rows."""
        chosen = self._rows[self._rows[:, 3] == (split == "val"), 0]
        return tuple(f"{self._name}-0000-{row:09d}" for row in chosen.tolist())

    def _draft(self, key: str) -> Draft:
        """The row of a key; raises as `messages`."""
        name, _, number = key.rpartition("-")
        if name != f"{self._name}-0000" or not number.isdigit():
            raise KeyError(key)
        at = int(np.searchsorted(self._rows[:, 0], int(number)))
        if at == len(self._rows) or self._rows[at, 0] != int(number):
            raise KeyError(key)
        _, start, size, _ = self._rows[at].tolist()
        with self._path.open("rb") as file:
            file.seek(start)
            found = parse(file.read(size))
        if isinstance(found, Fault):
            raise found
        return read_v2(found)

    def messages(self, key: str, metadata: Callable[[str], Any]) -> list[dict[str, Any]]:
        """The conversation of a key in v2 form, with the sizes of its media.

        Args:
            metadata: energon's, of a medium by its name.

        Raises:
            KeyError: no such key.
            ValueError: the row cannot be read any more.
        """
        messages = self._draft(key).messages
        for message in messages:
            for part in message["content"]:
                if part["type"] != "text":
                    part[part["type"]] = part[part["type"]].name
                    part["metadata"] = metadata(part[part["type"]]).to_dict()
        return messages

    def read_file(self, name: str) -> bytes:
        """A medium that is a plain file.

        Raises:
            ValueError: it is not there.
        """
        return self._finder.read(Medium("image", name))
