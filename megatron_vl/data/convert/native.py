"""The Nemotron VLM dataset v2, read where it lies: an index of its rows and tars, no copy.

The output folder holds links to the media tars under `media/`, energon's index of them, and two
files of its own in `.nv-meta`: `native.json` says where the rows are, `rows.npy` where each kept
one starts. Every row is read and checked once, its media by the headers in the tars;
`data/native.py` reads them later. Media that are plain files are read from their folder; their
sizes stand in the same table.
"""

import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.convert.choose import is_held_out
from megatron_vl.data.convert.conversation import Draft, Fault, Medium, Reason
from megatron_vl.data.convert.findings import IDS
from megatron_vl.data.convert.job import Job, Task, media_of
from megatron_vl.data.convert.writer import (
    TaskReport,
    id_digest,
    ids_file,
    look_at,
    report_file,
    walk,
)
from megatron_vl.data.index import identity_of, list_shards, write_index
from megatron_vl.data.native import MEDIA_FOLDER, NATIVE, ROW_FIELDS, ROWS
from megatron_vl.run.atomic import write_text


def index_media(job: Job, workers: int, tell: Callable[[int, int], None]) -> None:
    """Link the media tars and index them in the state folder, unless that is done."""
    meta = job.state / "nv-meta"
    if meta.exists():
        return
    folder = job.out / MEDIA_FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    names = []
    for number, tar in enumerate(job.tars):
        name = f"{MEDIA_FOLDER}/{number:05d}-{tar.name}"
        (job.out / name).symlink_to(tar)
        names.append(name)
    part = job.state / "nv-meta.building"
    shutil.rmtree(part, ignore_errors=True)
    listings = list_shards(job.out, names, workers=workers, tell=tell)
    problems = write_index(job.out, part, listings, {"train": [], "val": []}, offsets=False)
    write_text(
        job.media_faults,
        json.dumps({found.member or found.shard: found.text for found in problems}),
    )
    os.rename(part, meta)


class _Media:
    """What the index knows of media, by name."""

    def __init__(self, job: Job):
        path = job.state / "nv-meta" / "index.sqlite"
        self._base = sqlite3.connect(f"file:{path}?mode=ro&immutable=1", uri=True)
        self._finder = job.finder()
        self._faults = json.loads(job.media_faults.read_text(encoding="utf-8"))
        self.outside: dict[str, dict[str, Any]] = {}
        """Metadata of media whose headers the index does not hold."""

    def check(self, medium: Medium) -> None:
        """Make sure that a medium is there and of its kind; raises Fault."""
        query = "SELECT metadata_type FROM media_metadata WHERE entry_key = ?"
        found = self._base.execute(query, (medium.name,)).fetchone()
        if medium.name in self._faults:
            raise Fault(Reason.UNREADABLE, f"{medium.name}: {self._faults[medium.name]}")
        if found is None:
            if medium.name not in self.outside:
                data = self._finder.read(medium)
                self.outside[medium.name] = look_at(medium, data).metadata()
        elif found[0] != {"image": "image", "video": "av"}[medium.kind]:
            raise Fault(Reason.UNREADABLE, f"{medium.name} is no {medium.kind}")

    def close(self) -> None:
        self._base.close()
        self._finder.close()


def check_task(job: Job, task: Task, *, strict: bool) -> TaskReport:
    """Check a task's rows; its report is written unless a first fault stopped it."""
    report = TaskReport(task.number)
    media = _Media(job)
    places = job.places(task.file)
    rows: list[tuple[int, int, int, int]] = []
    ids: list[tuple[int, int, int]] = []

    def take(at: int, number: int, draft: Draft) -> None:
        found = media_of(draft)
        for medium in found:
            media.check(medium)
        subject = found[0].name if found else f"{job.labels[task.file]}/{number}"
        held_out = is_held_out(job.seed, subject, job.held_out)
        rows.append((number, int(places[at, 1]), int(places[at, 2]), int(held_out)))
        report.kept["val" if held_out else "train"] += 1
        for medium in found:
            report.media[medium.kind] += 1
        if draft.id is not None:
            ids.append((id_digest(draft.id), task.file, number))

    try:
        walk(job, task, report, take, strict)
    finally:
        media.close()
    if not report.stopped:
        np.save(ids_file(job, task), np.array(ids, dtype=IDS))
        np.save(_rows_file(job, task), np.array(rows, dtype=np.int64).reshape(-1, ROW_FIELDS))
        _outside_file(job, task).write_text(json.dumps(media.outside), encoding="utf-8")
        report.write(report_file(job, task))
    return report


def _rows_file(job: Job, task: Task) -> Path:
    return job.state / f"native-{task.stem}.npy"


def _outside_file(job: Job, task: Task) -> Path:
    return job.state / f"outside-{task.stem}.json"


def write_rows(job: Job, tasks: Sequence[Task], meta: Path) -> None:
    """Complete the index with the kept rows and the media outside the tars."""
    rows = np.concatenate([np.load(_rows_file(job, task)) for task in tasks])
    np.save(meta / ROWS, rows)
    with sqlite3.connect(meta / "index.sqlite") as base:
        for task in tasks:
            found = json.loads(_outside_file(job, task).read_text(encoding="utf-8"))
            base.executemany(
                "INSERT OR REPLACE INTO media_metadata VALUES (?, ?, ?)",
                [
                    (name, "image" if "width" in fields else "av", json.dumps(fields))
                    for name, fields in found.items()
                ],
            )
    base.close()
    (file,) = job.files
    status = file.stat()
    about = {
        "rows": str(file),
        "size": status.st_size,
        "mtime_ns": status.st_mtime_ns,
        "roots": [str(root) for root in job.roots],
        "source": job.name,
    }
    (meta / NATIVE).write_text(json.dumps(about, indent=1), encoding="utf-8")
    (meta / "index.uuid").write_text(identity_of(job.digest()), encoding="utf-8")
