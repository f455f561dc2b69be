"""The digest of a checkpoint folder: what a receipt records and the next stage checks.

Costs one read of every byte (1 to 2 GB a second from a warm cache, as the core's SHA-256 goes). A
folder that is being written can be followed, which costs its writer little after the last byte.
"""

import hashlib
import threading
from collections.abc import Mapping
from pathlib import Path

_BLOCK = 1 << 20


def checkpoint_digest(path: Path | str) -> str:
    """SHA-256 over the sorted relative names, lengths and contents of the files under a folder.

    Raises ValueError when there is no file. Folder names without files do not count, nor do times
    and permissions; a file renamed, moved, cut, grown or changed in one bit does.
    """
    root = Path(path)
    files = sorted(
        (file.relative_to(root).as_posix(), file) for file in root.rglob("*") if file.is_file()
    )
    if not files:
        raise ValueError(f"{root}: no checkpoint here (the folder is missing or holds no file)")
    total = _Total()
    for name, file in files:
        size = file.stat().st_size
        total.begin(name, size)
        total.add(file, 0, size)
    return total.hexdigest()


class FollowedDigest:
    """`checkpoint_digest` of a folder while it is written, in a thread of its own.

    Args:
        root: the folder.
        sizes: final length of every file there will be, by relative name. [bytes]
    """

    def __init__(self, root: Path, sizes: Mapping[str, int]) -> None:
        self._root, self._sizes = root, sizes
        self._ready = dict.fromkeys(sizes, 0)
        self._changed = threading.Condition()
        self._given_up = False
        self._digest: str | None = None
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> "FollowedDigest":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._changed:
            self._given_up = True
            self._changed.notify()
        self._thread.join()

    def grown(self, name: str, size: int) -> None:
        """Say that the first `size` bytes of a file are written and will not change."""
        with self._changed:
            self._ready[name] = size
            self._changed.notify()

    def result(self) -> str:
        """The digest; every file must have grown to its length. Raises OSError of a read."""
        assert self._ready == self._sizes
        self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._digest is not None
        return self._digest

    def _follow(self) -> None:
        total = _Total()
        try:
            for name, size in sorted(self._sizes.items()):
                total.begin(name, size)
                done = 0
                while done < size:
                    ready = self._wait_beyond(name, done)
                    if ready is None:
                        return
                    total.add(self._root / name, done, ready)
                    done = ready
        except OSError as error:
            self._error = error
        self._digest = total.hexdigest()

    def _wait_beyond(self, name: str, done: int) -> int | None:
        """How much of a file is ready once that is more than `done`; None where it never is."""
        with self._changed:
            self._changed.wait_for(lambda: self._given_up or self._ready[name] > done)
            return self._ready[name] if self._ready[name] > done else None


class _Total:
    """SHA-256 over headings and contents of files."""

    def __init__(self) -> None:
        self._hash = hashlib.sha256()
        self._block = memoryview(bytearray(_BLOCK))

    def begin(self, name: str, size: int) -> None:
        """Add a file's name and length."""
        self._hash.update(f"{len(name.encode())}:{name}:{size}:".encode())

    def add(self, path: Path, start: int, end: int) -> None:
        """Add a stretch of a file. Raises OSError where the file ends before it does."""
        with path.open("rb", buffering=0) as file:
            file.seek(start)
            while start < end:
                count = file.readinto(self._block[: end - start])
                if not count:
                    raise OSError(f"{path} became shorter while it was read")
                self._hash.update(self._block[:count])
                start += count

    def hexdigest(self) -> str:
        """Of all that was added."""
        return self._hash.hexdigest()
