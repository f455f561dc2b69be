"""A folder that appears complete or not at all, and that a killed writer can go on with.

Work goes on in `OUT.partial` beside the final place, under a lock. Finished files are recorded in
it with the hash of every tensor; the next start verifies them by reading them again. When all is
written and flushed to disk, one rename makes it the result.

Refuses an OUT that exists, and a second writer.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from checkpoint_tools.errors import ConversionError
from megatron_vl.run import atomic

PARTIAL_SUFFIX = ".partial"
_PROGRESS = "progress.json"
_LOCK = ".lock"
_SYNCS = 8
"""Files flushed to disk at a time."""


class Workspace:
    """The unfinished folder.

    Args:
        final: where the result goes.
        plan: what is being made and from what, as JSON values; files of another plan are dropped.

    Attributes:
        path: where to write.
        finished: record of each finished file that an earlier attempt with this plan left.
    """

    def __init__(self, final: Path, plan: dict[str, Any]) -> None:
        self.final = final
        self.path = final.with_name(final.name + PARTIAL_SUFFIX)
        canonical = json.dumps(plan, sort_keys=True, separators=(",", ":"))
        self._plan = hashlib.sha256(canonical.encode()).hexdigest()
        self.finished: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> "Workspace":
        if self.final.exists():
            raise ConversionError(
                f"{self.final} exists already; name another folder or remove it first"
            )
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / _LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise ConversionError(f"{self.path} is being written by another process") from None
        self.finished = self._earlier()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def _earlier(self) -> dict[str, dict[str, Any]]:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            record = json.loads((self.path / _PROGRESS).read_text())
            if record["plan"] == self._plan:
                return dict(record["finished"])
        self.clear()
        return {}

    def clear(self) -> None:
        """Drop all that is there, as what it was made of turned out to be wrong."""
        self.finished = {}
        for path in self.path.iterdir():
            if path.name == _LOCK:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def finish_file(self, name: str, record: dict[str, Any]) -> None:
        """Remember that a file is complete and on disk."""
        self.finished[name] = record
        text = json.dumps({"plan": self._plan, "finished": self.finished})
        atomic.write_text(self.path / _PROGRESS, text)

    def publish(self) -> None:
        """Flush everything to disk and rename the folder to its final name."""
        for name in (_PROGRESS, _LOCK):
            (self.path / name).unlink(missing_ok=True)
        # At once, as one commit of the file system's journal then serves many.
        with ThreadPoolExecutor(_SYNCS) as pool:
            list(pool.map(atomic.sync, [*self.path.rglob("*"), self.path]))
        os.rename(self.path, self.final)
        atomic.sync(self.final.parent)


def files_identity(folder: Path) -> dict[str, list[int]]:
    """Sizes and times of the files of a folder: whether a source is still what it was."""
    return {
        path.relative_to(folder).as_posix(): [s.st_size, s.st_mtime_ns]
        for path, s in _stats(folder)
    }


def _stats(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path, path.stat()
