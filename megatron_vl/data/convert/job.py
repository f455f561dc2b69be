"""What a conversion does, cut into tasks that any worker can do in any order.

A `Task` is a run of rows of one file, about one shard's worth, measured on a few rows before the
work starts. The cut depends on the source and the options alone, never on the workers, so shards
have the same bytes however many there are and however often the work was stopped.
"""

import hashlib
import json
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vl.data.convert.choose import is_chosen
from megatron_vl.data.convert.conversation import Draft, Fault, Medium
from megatron_vl.data.convert.formats import FORMATS, Format
from megatron_vl.data.convert.media import MediaFinder
from megatron_vl.data.convert.rows import Places, read_rows
from megatron_vl.run.atomic import write_text

STATE = ".convert"
"""Folder inside the output that holds an unfinished conversion's state."""

_MOST_ROWS = 100_000
"""Rows of the largest task: texts without media are cut by this, so that workers can share them."""
_MEASURED_ROWS = 64
_FILL = 0.95
"""Part of a shard a task aims at: one that comes out a little larger needs no second shard."""
_TAR_OVERHEAD = 768
"""Bytes a tar adds to a member, on average: its header, and padding."""


@dataclass(frozen=True)
class Job:
    """One conversion; every field but the folders decides what comes out.

    name: of the source; begins its keys and stands in its rows.
    files: that hold the rows. labels: their names inside the source, as reports say them.
    roots: where media are. tars: that hold media.
    shard_size: largest shard, unless a single sample is larger. [bytes]
    fraction, held_out: shares of the rows. limit: most rows read, 0 for all.
    """

    format: str
    name: str
    out: Path
    files: tuple[Path, ...]
    labels: tuple[str, ...]
    roots: tuple[Path, ...]
    tars: tuple[Path, ...]
    shard_size: int
    fraction: float
    held_out: float
    limit: int
    seed: int

    @property
    def kind(self) -> Format:
        """The format."""
        return FORMATS[self.format]

    @property
    def state(self) -> Path:
        """The folder of the unfinished conversion's state."""
        return self.out / STATE

    @property
    def catalogue(self) -> Path | None:
        """The database of tar members, None where none is needed."""
        return self.state / "media.sqlite" if self.tars and not self.kind.native else None

    def places_file(self, file: int) -> Path:
        """Where the places of a file's rows are kept."""
        return self.state / f"rows-{file:04d}.npy"

    def places(self, file: int) -> Places:
        """The places of a file's rows."""
        return np.load(self.places_file(file), mmap_mode="r")

    @property
    def media_faults(self) -> Path:
        """What is wrong with the media tars and their members, by name."""
        return self.state / "media-faults.json"

    def finder(self) -> MediaFinder:
        """Opens the media."""
        return MediaFinder(self.roots, self.catalogue)

    def digest(self) -> str:
        """Changes with everything that decides the output, the readers' own code included."""
        inputs = {
            **asdict(self),
            "out": self.name,
            "files": [_stamp(file) for file in self.files],
            "tars": [_stamp(tar) for tar in self.tars],
        }
        code = hashlib.sha256()
        here = Path(__file__).parent
        for file in sorted([*here.glob("*.py"), here.parent / "headers.py"]):
            code.update(file.read_bytes())
        text = json.dumps([inputs, code.hexdigest()], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _stamp(file: Path) -> list[Any]:
    """What tells a file from another version of it."""
    status = file.stat()
    return [str(file), status.st_size, status.st_mtime_ns]


@dataclass(frozen=True)
class Task:
    """Rows `start` to `stop` of a file, counted in its array of places."""

    number: int
    file: int
    start: int
    stop: int

    @property
    def stem(self) -> str:
        """Begins the names of the task's files."""
        return f"{self.number:05d}"

    @property
    def rows(self) -> int:
        """Rows of the task, chosen or not."""
        return self.stop - self.start


def plan_tasks(job: Job) -> list[Task]:
    """The tasks of a job whose rows have been found; planned once, then read from its state."""
    kept = job.state / "tasks.json"
    if kept.exists():
        return [Task(*fields) for fields in json.loads(kept.read_text(encoding="utf-8"))]
    tasks = _cut_into_tasks(job)
    write_text(kept, json.dumps([astuple(task) for task in tasks]))
    return tasks


def _cut_into_tasks(job: Job) -> list[Task]:
    tasks: list[Task] = []
    left = job.limit or None
    finder = job.finder()
    for file, path in enumerate(job.files):
        places = job.places(file)
        if left is not None:
            taken = _rows_within(job, file, places, left)
            places = places[: taken[0]]
            left -= taken[1]
        if len(places):
            size = _mean_size(job, path, places, finder) * max(job.fraction, 1e-6)
            step = int(min(max(_FILL * job.shard_size / size, 1), _MOST_ROWS))
            for start, stop in _cuts(path, places, step):
                tasks.append(Task(len(tasks), file, start, stop))
    finder.close()
    return tasks


def _rows_within(job: Job, file: int, places: Places, limit: int) -> tuple[int, int]:
    """How many rows to look at for `limit` chosen ones, and how many are found."""
    if job.fraction >= 1:
        return min(limit, len(places)), min(limit, len(places))
    found = 0
    for at, number in enumerate(places[:, 0].tolist()):
        if found == limit:
            return at, found
        found += is_chosen(job.seed, job.labels[file], number, job.fraction)
    return len(places), found


def _cuts(path: Path, places: Places, step: int) -> list[tuple[int, int]]:
    """Stretches of `step` rows; of a parquet file, of whole row groups of at least so many."""
    edges = [0]
    if path.suffix == ".parquet":
        for at in np.flatnonzero(np.diff(places[:, 1])) + 1:
            if at - edges[-1] >= step:
                edges.append(int(at))
    else:
        edges += range(step, len(places), step)
    return list(zip(edges, [*edges[1:], len(places)], strict=True))


def _mean_size(job: Job, path: Path, places: Places, finder: MediaFinder) -> float:
    """Bytes of a row with its media, on average over a few rows spread through the file."""
    if path.suffix == ".parquet":
        return float(places[:, 2].mean()) + _TAR_OVERHEAD
    chosen = np.linspace(0, len(places) - 1, min(_MEASURED_ROWS, len(places))).astype(int)
    sizes = []
    for _, row in read_rows(path, places[chosen]):
        try:
            draft = None if isinstance(row, Fault) else job.kind.read(row)
        except Fault:
            draft = None
        found = media_of(draft) if draft else []
        sizes.append(sum(finder.size(medium) + _TAR_OVERHEAD for medium in found))
    return float(places[:, 2].mean()) + _TAR_OVERHEAD + sum(sizes) / len(sizes)


def media_of(draft: Draft) -> list[Medium]:
    """The media of a draft, in order."""
    return [
        part[part["type"]]
        for message in draft.messages
        for part in message["content"]
        if part["type"] != "text"
    ]
