"""A copy of the code in the run folder, so that editing the repository changes no run under way.

The copy lies in `RUN/code/DIGEST`; the same code is copied once. It holds the packages' own files,
a few hundred kilobytes, and nothing of the environment they run in.
"""

import hashlib
import os
import shutil
from pathlib import Path

from megatron_vl.run.folder import RunFolder

PACKAGES = ("megatron_vl", "launch", "checkpoint_tools")
ROOT = Path(__file__).resolve().parents[1]


def snapshot_folder(run: RunFolder, root: Path = ROOT) -> Path:
    """Where the snapshot of the present code lies, or will."""
    return run.path.resolve() / "code" / _digest(_contents(root))


def take_snapshot(run: RunFolder, root: Path = ROOT) -> Path:
    """Copy the packages into the run folder, unless this very code is there; returns its folder."""
    contents = _contents(root)  # read once: somebody may be editing
    folder = run.path.resolve() / "code" / _digest(contents)
    if folder.is_dir():
        return folder
    partial = folder.with_name(f"{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        for name, content in contents.items():
            target = partial / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return folder


def _contents(root: Path) -> dict[str, bytes]:
    """Every file of the packages by its relative name."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for package in PACKAGES
        for path in sorted((root / package).rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }


def _digest(contents: dict[str, bytes]) -> str:
    """Twelve hex digits that change when any file does."""
    total = hashlib.sha256()
    for name, content in contents.items():
        total.update(f"{name}:{len(content)}:".encode())
        total.update(content)
    return total.hexdigest()[:12]
