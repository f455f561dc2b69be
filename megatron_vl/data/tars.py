"""What lies in a tar file: names, places, sizes, and the headers of the media.

Only tar headers and media headers are read; the contents are skipped by seeking. Members before a
broken place are listed all the same, so one torn download costs one file, not its shard. Imports no
torch.
"""

import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.headers import media_kind, probe


@dataclass(frozen=True)
class Member:
    """A regular file of a tar.

    offset: of its tar header. place, size: of its bytes.
    metadata: of an image or video whose header was read. fault: why it could not be.
    """

    name: str
    offset: int
    place: int
    size: int
    metadata: dict[str, Any] | None = None
    fault: str = ""


@dataclass(frozen=True)
class Listing:
    """A tar's members, where its last one ends, and what is wrong with it ("" if nothing)."""

    members: list[Member]
    end: int
    problem: str = ""


def list_tar(path: Path, *, headers: bool) -> Listing:
    """List a tar file; `headers` reads those of the images and videos too."""
    members: list[Member] = []
    end, problem = 0, ""
    try:
        size = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for item in tar:
                end = item.offset_data + -(-item.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if item.isreg() and not item.issparse():
                    members.append(_member(tar, item, size, headers))
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        problem = f"{path.name}: {error}"
    return Listing(members, end, problem)


def _member(tar: tarfile.TarFile, item: tarfile.TarInfo, tar_size: int, headers: bool) -> Member:
    name = item.name.removeprefix("./")
    kind = media_kind(name)
    metadata: dict[str, Any] | None = None
    fault = ""
    if item.offset_data + item.size > tar_size:
        fault = "cut off at the end of its tar"
    elif headers and kind is not None:
        stream = tar.extractfile(item)
        assert stream is not None
        try:
            metadata = probe(kind, stream).metadata()  # type: ignore[arg-type]
        except ValueError as error:
            fault = str(error)
    return Member(name, item.offset, item.offset_data, item.size, metadata, fault)
