"""One task of a conversion: rows in, shards out.

Every chosen row is read, checked, its media found and looked at (headers, and ends of files), and
written as `KEY.json`, `KEY.0.jpg` ... to the shard of its split. A row with a fault is left out and
reported. Shards are written under another name and renamed when whole; the task's report, written
last, says that they are: a task without one is done again, from its first row, to the same bytes.
"""

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.convert.choose import is_chosen, is_held_out
from megatron_vl.data.convert.conversation import Draft, Fault, Medium, Reason
from megatron_vl.data.convert.findings import IDS, Finding
from megatron_vl.data.convert.job import Job, Task, media_of
from megatron_vl.data.convert.media import MediaFinder
from megatron_vl.data.convert.rows import read_rows
from megatron_vl.data.headers import VIDEO_SUFFIXES, ImageHeader, VideoHeader, probe
from megatron_vl.data.workers import advance
from megatron_vl.run.atomic import write_text

_IMAGE_SUFFIXES = {"JPEG": "jpg", "MPO": "jpg", "TIFF": "tif", "JPEG2000": "jp2"}
"""Suffixes of image formats that are not the format's name in small letters."""


@dataclass
class TaskReport:
    """What came of a task.

    kept: samples of each split. media: files and bytes of each kind. stopped: at a first fault.
    """

    task: int
    rows: int = 0
    chosen: int = 0
    kept: dict[str, int] = field(default_factory=lambda: {"train": 0, "val": 0})
    media: dict[str, int] = field(default_factory=lambda: {"image": 0, "video": 0, "bytes": 0})
    shards: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    stopped: bool = False

    def write(self, path: Path) -> None:
        """Write it whole; this is what makes a task done."""
        write_text(path, json.dumps(asdict(self)))

    @classmethod
    def read(cls, path: Path) -> "TaskReport":
        """The report of a task that is done."""
        fields = json.loads(path.read_text(encoding="utf-8"))
        findings = [Finding(**found) for found in fields.pop("findings")]
        return cls(**fields, findings=findings)


def report_file(job: Job, task: Task) -> Path:
    """A task's report."""
    return job.state / f"task-{task.stem}.json"


def ids_file(job: Job, task: Task) -> Path:
    """Digests of the ids of a task's kept rows."""
    return job.state / f"ids-{task.stem}.npy"


def walk(
    job: Job, task: Task, report: TaskReport, take: Callable[[int, int, Draft], None], strict: bool
) -> None:
    """Hand the chosen rows of a task to `take`, noting every fault; `strict` ends at the first.

    `take` gets the place in the file's array, the row number and the draft, and may raise Fault.
    """
    label = job.labels[task.file]
    places = job.places(task.file)[task.start : task.stop]
    rows = read_rows(job.files[task.file], places)
    for at, (number, row) in enumerate(rows, task.start):
        advance()
        report.rows += 1
        if not is_chosen(job.seed, label, number, job.fraction):
            continue
        report.chosen += 1
        try:
            if isinstance(row, Fault):
                raise row
            draft = job.kind.read(row)
            take(at, number, draft)
        except Fault as fault:
            named = row.get("id") if isinstance(row, dict) else None
            report.findings.append(Finding.of(label, number, fault, named))
            report.stopped = strict
            if strict:
                return
            continue
        for reason, detail in draft.notes:
            report.findings.append(Finding(label, number, reason.value, detail, draft.id or ""))


def key_of(job: Job, file: int, row: int) -> str:
    """The key of a row: no dots, unique in the source, the same whatever else is converted."""
    return f"{job.name}-{file:04d}-{row:09d}"


def id_digest(text: str) -> int:
    """A row's id as a number, to find duplicates."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def run_task(job: Job, task: Task, *, strict: bool) -> TaskReport:
    """Convert a task's rows; returns its report, written unless a first fault stopped it."""
    report = TaskReport(task.number)
    ids: list[tuple[int, int, int]] = []
    finder = job.finder()
    shards = {
        split: ShardWriter(job.out, f"{split}-{task.stem}", job.shard_size) for split in report.kept
    }

    def take(_: int, number: int, draft: Draft) -> None:
        subject, members = _members(job, task, number, draft, finder)
        split = "val" if is_held_out(job.seed, subject, job.held_out) else "train"
        shards[split].add(members)
        report.kept[split] += 1
        for kind in (medium.kind for medium in media_of(draft)):
            report.media[kind] += 1
        report.media["bytes"] += sum(len(data) for _, data in members[1:])
        if draft.id is not None:
            ids.append((id_digest(draft.id), task.file, number))

    try:
        walk(job, task, report, take, strict)
    except BaseException:
        for writer in shards.values():
            writer.discard()
        raise
    finally:
        finder.close()
    for split, writer in shards.items():
        report.shards += [{"split": split, **shard} for shard in writer.close()]
    if not report.stopped:
        np.save(ids_file(job, task), np.array(ids, dtype=IDS))
        report.write(report_file(job, task))
    return report


def _members(
    job: Job, task: Task, number: int, draft: Draft, finder: MediaFinder
) -> tuple[str, list[tuple[str, bytes]]]:
    """What a row is about, and its tar members: KEY.json, then the media as the row names them.

    Raises:
        Fault: a medium cannot be found or read.
    """
    key = key_of(job, task.file, number)
    members: list[tuple[str, bytes]] = []
    label = job.labels[task.file]
    subject = f"{label}/{number}"
    messages = []
    for message in draft.messages:
        parts = []
        for part in message["content"]:
            if part["type"] != "text":
                medium: Medium = part[part["type"]]
                data = finder.read(medium)
                header = look_at(medium, data)
                if not members:
                    subject = medium.name or hashlib.blake2b(data, digest_size=8).hexdigest()
                name = f"{key}.{len(members)}.{_suffix(medium, header, data)}"
                members.append((name, data))
                part = {"type": medium.kind, medium.kind: name, "metadata": header.metadata()}
            parts.append(part)
        messages.append({"role": message["role"], "content": parts})
    row: dict[str, Any] = {"id": draft.id or key, "source": draft.source or job.name}
    if draft.license is not None:
        row["license"] = draft.license
    row["origin"] = {"file": label, "row": number}
    row["messages"] = messages
    return subject, [(f"{key}.json", json.dumps(row, ensure_ascii=False).encode()), *members]


def look_at(medium: Medium, data: bytes) -> ImageHeader | VideoHeader:
    """The header of a medium.

    Raises:
        Fault: it is empty, no image or video of its kind, or cut off.
    """
    named = medium.name or "the bytes in the row"
    if not data:
        raise Fault(Reason.UNREADABLE, f"{named}: no bytes")
    try:
        return probe(medium.kind, data)
    except ValueError as error:
        raise Fault(Reason.UNREADABLE, f"{named}: {error}") from error


def _suffix(medium: Medium, header: ImageHeader | VideoHeader, data: bytes) -> str:
    """The suffix that says what a medium is, whatever its name says."""
    if isinstance(header, ImageHeader):
        return _IMAGE_SUFFIXES.get(header.format, header.format.lower())
    suffix = Path(medium.name).suffix.lstrip(".").lower()
    if suffix in VIDEO_SUFFIXES:
        return suffix
    return "mp4" if data[4:8] == b"ftyp" else "mkv"


class ShardWriter:
    """Tar files of at most `limit` bytes, whole or absent, without times or owners.

    Files are `STEM-000.tar`, `STEM-001.tar` ...; a sample larger than the limit has one to itself.
    """

    def __init__(self, folder: Path, stem: str, limit: int):
        self._folder, self._stem, self._limit = folder, stem, limit
        self._tar: tarfile.TarFile | None = None
        self._part = Path()
        self._samples = 0
        self._finished: list[dict[str, Any]] = []

    def add(self, members: list[tuple[str, bytes]]) -> None:
        """Append a sample."""
        block = tarfile.BLOCKSIZE
        size = sum(block + -(-len(data) // block) * block for _, data in members)
        end = 2 * block
        if self._tar is not None and self._tar.offset + size + end > self._limit:
            self._finish()
        if self._tar is None:
            name = f".{self._stem}-{len(self._finished):03d}.{os.getpid()}.part"
            self._part = self._folder / name
            self._tar = tarfile.open(self._part, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            self._tar.addfile(info, io.BytesIO(data))
        self._samples += 1

    def _finish(self) -> None:
        """Close the open shard, flush it to disk and give it its name."""
        assert self._tar is not None
        self._tar.close()
        self._tar = None
        handle = os.open(self._part, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        name = f"{self._stem}-{len(self._finished):03d}.tar"
        size = self._part.stat().st_size
        os.replace(self._part, self._folder / name)
        self._finished.append({"name": name, "samples": self._samples, "bytes": size})
        self._samples = 0

    def close(self) -> list[dict[str, Any]]:
        """Finish the last shard; returns name, samples and bytes of each."""
        if self._tar is not None:
            self._finish()
        return self._finished

    def discard(self) -> None:
        """Drop the unfinished shard."""
        if self._tar is not None:
            self._tar.close()
            self._tar = None
            self._part.unlink(missing_ok=True)
