"""The digest of a checkpoint folder: what a receipt records and the next stage checks.

Costs one read of every byte (about 1 GB a second from a warm cache), in blocks of 4 MiB.
"""

import hashlib
from pathlib import Path

_BLOCK = 4 << 20


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
    total = hashlib.sha256()
    for name, file in files:
        total.update(f"{len(name.encode())}:{name}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                total.update(block)
    return total.hexdigest()
