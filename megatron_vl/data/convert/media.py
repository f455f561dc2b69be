"""Finds the media that rows name: in folders, in tar files, or inside the row.

A name is looked up in every root of a source in turn. It must stay inside: absolute names are taken
if they lie under a root, `..` that leads out of it is refused, URLs are refused (nothing is fetched
here). Tar files are listed once into a small database; members are then read by place.
"""

import contextlib
import os
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from megatron_vl.data.convert.conversation import Fault, Medium, Reason
from megatron_vl.data.tars import list_tar

LARGEST = 8 * 1024**3 - 1
"""Bytes of the largest medium; a plain tar header can say no more."""

_OPEN_TARS = 16


class MediaFinder:
    """Reads media by name.

    Args:
        roots: folders, in the order they are searched.
        catalogue: database of tar members made by `write_catalogue`, or None.
    """

    def __init__(self, roots: Sequence[Path], catalogue: Path | None = None):
        self._roots = [os.path.abspath(root) for root in roots]
        self._tars: dict[str, BinaryIO] = {}
        self._members = None
        if catalogue is not None:
            self._members = sqlite3.connect(f"file:{catalogue}?mode=ro&immutable=1", uri=True)

    def read(self, medium: Medium) -> bytes:
        """The bytes of a medium.

        Raises:
            Fault: it is not there, cannot be read, or lies outside the roots.
        """
        if medium.data is not None:
            return medium.data
        name = medium.name
        if "://" in name:
            raise Fault(Reason.REMOTE, f"{name}; fetch it and name the file")
        if self._members is not None and (found := self._member(name)) is not None:
            return self._read_member(name, *found)
        path = self._file(name)
        try:
            if path.stat().st_size > LARGEST:
                raise Fault(Reason.UNREADABLE, f"{name} is larger than 8 GiB")
            return path.read_bytes()
        except OSError as error:
            raise Fault(Reason.UNREADABLE, f"{name}: {error.strerror}") from error

    def size(self, medium: Medium) -> int:
        """Bytes of a medium, 0 where it cannot be found."""
        if medium.data is not None:
            return len(medium.data)
        if self._members is not None and (found := self._member(medium.name)) is not None:
            return found[2]
        with contextlib.suppress(Fault, OSError):
            return self._file(medium.name).stat().st_size
        return 0

    def _member(self, name: str) -> tuple[str, int, int] | None:
        assert self._members is not None
        query = "SELECT tar, place, size FROM members WHERE name = ?"
        row = self._members.execute(query, (name.removeprefix("./"),)).fetchone()
        return None if row is None else (row[0], row[1], row[2])

    def _read_member(self, name: str, tar: str, place: int, size: int) -> bytes:
        if tar not in self._tars:
            if len(self._tars) >= _OPEN_TARS:
                self._tars.pop(next(iter(self._tars))).close()
            self._tars[tar] = open(tar, "rb")  # noqa: SIM115 kept open for the next member
        self._tars[tar].seek(place)
        data = self._tars[tar].read(size)
        if len(data) < size:
            raise Fault(Reason.UNREADABLE, f"{name} is cut off at the end of {tar}")
        return data

    def _file(self, name: str) -> Path:
        """The file of a name under the roots."""
        inside = False
        for root in self._roots:
            path = os.path.normpath(os.path.join(root, name))
            if os.path.commonpath([root, path]) != root or "\0" in name:
                continue
            inside = True
            if os.path.isfile(path):
                return Path(path)
        if not inside:
            raise Fault(Reason.OUTSIDE, f"{name!r} leads out of {', '.join(self._roots)}")
        raise Fault(Reason.MISSING, f"{name} is not under {', '.join(self._roots)}")

    def close(self) -> None:
        """Close files and database."""
        for file in self._tars.values():
            file.close()
        if self._members is not None:
            self._members.close()


def write_catalogue(path: Path, tars: Sequence[Path]) -> Iterator[str]:
    """List tar files into a database at `path`, yielding what is wrong with each ("" if nothing).

    Of two members with one name the first counts, in the order of the tars. The file appears when
    all are listed.
    """
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(part)) as base:
        base.execute(
            "CREATE TABLE members (name TEXT PRIMARY KEY, tar TEXT, place INTEGER, size INTEGER) "
            "WITHOUT ROWID"
        )
        for tar in tars:
            listing = list_tar(tar, headers=False)
            rows = [(found.name, str(tar), found.place, found.size) for found in listing.members]
            base.executemany("INSERT OR IGNORE INTO members VALUES (?, ?, ?, ?)", rows)
            yield listing.problem
        base.commit()
    os.replace(part, path)
