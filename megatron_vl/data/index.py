"""Makes a folder of tar files an energon data set, reading media headers only.

Writes what `energon prepare` writes (`.nv-meta/` with index.sqlite, its table of media sizes,
.info.json, split.yaml, dataset.yaml and index.uuid, and a .tar.idx beside every shard) by energon's
own writers, with three differences: no image is decoded for its size (energon's pass decodes each);
one unreadable image costs its own entry, not its shard; sizes are those of upright images. The uuid
is a digest of the index, so the same shards have the same identity.

`.nv-meta` appears whole, or the old one stays. Costs 0.1 ms a medium and one seek a file.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_vl.data.tars import Listing, Member, list_tar
from megatron_vl.data.workers import advance, each

if TYPE_CHECKING:
    from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter

META = ".nv-meta"
SPLITS = ("train", "val")

_NAME = re.compile(r"^((?:.*/|)[^.]+)[.]([^/]*)$")
_SKIPPED = re.compile(r"__[^/]*__($|/)")
_IDENTITY = uuid.UUID("6f1d2f52-6b9a-4f0e-9d53-2f6f5a6f7c11")

Tell = Callable[[int, int], None]


class Problem(NamedTuple):
    """What is wrong with a shard, or with one of its members."""

    shard: str
    member: str
    text: str


def identity_of(digest: str) -> str:
    """The uuid of an index with this digest."""
    return str(uuid.uuid5(_IDENTITY, digest))


def index_source(
    folder: Path, *, workers: int = 1, tell: Tell = lambda done, total: None
) -> list[Problem]:
    """Make a folder of {train,val}-*.tar a data set; returns what was wrong.

    Args:
        tell: is told how many of how many shards were read.

    Raises:
        ValueError: the folder holds no such shards, or a shard is no tar file.
    """
    splits = {
        split: [file.name for file in sorted(folder.glob(f"{split}-*.tar"))] for split in SPLITS
    }
    shards = [shard for names in splits.values() for shard in names]
    if not shards:
        raise ValueError(f"{folder} holds no shards; name them train-000.tar, val-000.tar ...")
    meta = folder / f"{META}.part"
    shutil.rmtree(meta, ignore_errors=True)
    listings = list_shards(folder, shards, workers=workers, tell=tell)
    problems = write_index(folder, meta, listings, splits)
    publish(meta, folder)
    return problems


def list_shards(
    folder: Path,
    shards: Sequence[str],
    *,
    workers: int = 1,
    tell: Tell = lambda done, total: None,
) -> Iterable[tuple[str, Listing]]:
    """Shards and their listings, in order, media headers read."""
    total = len(shards)
    work = partial(_list, folder)
    return zip(
        shards,
        each(work, shards, workers=min(workers, total) or 1, tell=lambda done: tell(done, total)),
        strict=True,
    )


def _list(folder: Path, shard: str) -> Listing:
    listing = list_tar(folder / shard, headers=True)
    advance()
    return listing


def write_index(
    folder: Path,
    meta: Path,
    listings: Iterable[tuple[str, Listing]],
    splits: Mapping[str, Sequence[str]],
    *,
    offsets: bool = True,
) -> list[Problem]:
    """Write energon's index of shards into the new folder `meta`; returns what was wrong.

    Args:
        listings: name, relative to `folder`, and listing of each shard.
        splits: shards of each split.
        offsets: write a .tar.idx beside each shard, for reading them in sequence.

    Raises:
        ValueError: a shard is no tar file.
    """
    from megatron.energon import __version__
    from megatron.energon.epathlib import EPath
    from megatron.energon.flavors.webdataset.indexing import SqliteIndexWriter

    meta.mkdir(parents=True)
    counts: dict[str, int] = {}
    problems: list[Problem] = []
    digest = hashlib.sha256()
    base = SqliteIndexWriter(EPath(meta / "index.sqlite"), enable_media_metadata=True)
    with contextlib.closing(base):
        for shard, listing in listings:
            if listing.problem and not listing.members:
                raise ValueError(f"{folder / shard} cannot be read: {listing.problem}")
            found = _Shard(len(counts), listing)
            problems += [Problem(shard, "", listing.problem)] * bool(listing.problem)
            problems += [Problem(shard, member, text) for member, text in found.add_to(base)]
            if offsets:
                found.write_offsets(folder / shard)
            counts[shard] = len(found.samples)
            digest.update(repr((shard, listing)).encode())
    info = {"energon_version": __version__, "shard_counts": counts}
    (meta / ".info.json").write_text(json.dumps(info, indent=2), encoding="utf-8")
    split = {"split_parts": {name: list(files) for name, files in splits.items()}, "exclude": []}
    (meta / "split.yaml").write_text(json.dumps(split, indent=2), encoding="utf-8")
    (meta / "index.uuid").write_text(identity_of(digest.hexdigest()), encoding="utf-8")
    definition = (
        "__module__: megatron.energon\n__class__: CrudeWebdataset\n"
        f"subflavors:\n  source: {json.dumps(folder.name)}\n"
    )
    (meta / "dataset.yaml").write_text(definition, encoding="utf-8")
    return problems


def publish(meta: Path, folder: Path) -> None:
    """Put a finished index in place of the folder's old one."""
    old = folder / f"{META}.old"
    shutil.rmtree(old, ignore_errors=True)
    if (folder / META).exists():
        os.rename(folder / META, old)
    os.rename(meta, folder / META)
    shutil.rmtree(old, ignore_errors=True)


class _Shard:
    """The rows of the index for one shard.

    Members with one name up to the first dot are one sample. Where such members do not stand
    together they are one sample all the same, found by place; a sequential reader sees the first
    run.
    """

    def __init__(self, number: int, listing: Listing):
        self.number, self.end = number, listing.end
        self.samples: dict[str, tuple[int, int]] = {}
        """Offset and size of each sample's first run, by key."""
        self._runs: list[int] = []
        self._parts: list[tuple[str, str, Member]] = []
        last = ""
        for member in listing.members:
            name = _NAME.match(member.name)
            if name is None or _SKIPPED.match(member.name):
                continue
            key, part = name.groups()
            if key != last:
                self._close(last, member.offset)
                self._runs.append(member.offset)
                self.samples.setdefault(key, (member.offset, 0))
                last = key
            self._parts.append((key, part, member))
        self._close(last, listing.end)

    def _close(self, key: str, end: int) -> None:
        if key and self.samples[key][1] == 0:
            self.samples[key] = (self.samples[key][0], end - self.samples[key][0])

    def add_to(self, base: "SqliteIndexWriter") -> list[tuple[str, str]]:
        """Write the rows; returns what could not be taken in."""
        from megatron.energon.flavors.webdataset.indexing import DuplicateSampleKeyError
        from megatron.energon.flavors.webdataset.prepare import (
            IndexMediaMetadata,
            IndexSample,
            IndexSamplePart,
        )

        numbers = {key: number for number, key in enumerate(self.samples)}
        rows = [
            IndexSample(
                tar_file_id=self.number,
                sample_key=key,
                sample_index=numbers[key],
                byte_offset=offset,
                byte_size=size,
            )
            for key, (offset, size) in self.samples.items()
        ]
        refused: set[str] = set()
        try:
            base.append_samples(rows)
        except DuplicateSampleKeyError:
            for row in rows:
                try:
                    base.append_samples([row])
                except DuplicateSampleKeyError:
                    refused.add(row.sample_key)
        kept = [(key, part, member) for key, part, member in self._parts if key not in refused]
        base.append_parts(
            [
                IndexSamplePart(
                    tar_file_id=self.number,
                    sample_index=numbers[key],
                    part_name=part,
                    content_byte_offset=member.place,
                    content_byte_size=member.size,
                )
                for key, part, member in kept
            ]
        )
        base.append_media_metadata_batch(
            [
                IndexMediaMetadata(
                    entry_key=f"{key}.{part}",
                    metadata_type="image" if "width" in member.metadata else "av",
                    metadata_json=json.dumps(member.metadata, separators=(",", ":")),
                )
                for key, part, member in kept
                if member.metadata is not None
            ]
        )
        problems = [(member.name, member.fault) for _, _, member in kept if member.fault]
        clash = "another shard has a file of this name up to its first dot"
        return problems + [(member.name, clash) for key, _, member in self._parts if key in refused]

    def write_offsets(self, shard: Path) -> None:
        """Write the .tar.idx of sequential readers."""
        from megatron.energon.epathlib import EPath
        from megatron.energon.flavors.webdataset.itar import TarIndexWriter

        with TarIndexWriter(EPath(shard)) as writer:
            for offset in [*self._runs, self.end]:
                writer.append(offset)
