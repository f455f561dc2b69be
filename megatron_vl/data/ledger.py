"""What a stage has trained on: `data.jsonl` in the stage's folder, and samples that were broken.

    {"opened": {"step": 0, "cursor": 0, "plan": "7f..."}}
    {"step": 1, "packs": [0, 4], "samples": 31, "tokens": 2031, "ids": "c0ffee..."}
    {"saved": 2, "samples": {"captions": 40, "ocr": 21}}
    {"bad": {"source": "ocr", "key": ..., "epoch": 0, "pack": 5, "instead": ..., "error": ...}}

The plan is the truth, the ledger is its receipt: `ids` is a digest of every sample of a global
batch, in order, which `PackLoader.batch_record` computes again from the plan at any time. A run
that goes on from a checkpoint writes another `opened` line; steps after it written before it
belong to lost weights, and `lineage` leaves them out. So killing a run between a step and its line,
or in the middle of a line, changes nothing of what the ledger says about the weights that live.

One rank writes a file (`data.jsonl` the first, `bad_samples.RANK.jsonl` each rank that finds one).
"""

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FIRST_LOOK = 8
"""A source whose first samples, this many, can all not be decoded fails the run at once."""
LEAST_SEEN = 1000
"""The allowed share of bad samples is taken of at least this many."""


class BadDataError(RuntimeError):
    """Too many samples of a source cannot be decoded; the message names the first of them."""


@dataclass(frozen=True)
class BatchRecord:
    """What one global batch holds.

    packs: its first pack, and the first after it. tokens: without padding.
    ids: digest of its samples. sources: samples of each source.
    """

    packs: tuple[int, int]
    samples: int
    tokens: int
    ids: str
    sources: Mapping[str, int]


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be decoded, and the key of what stands in its place ("" if none)."""

    source: str
    key: str
    epoch: int
    pack: int
    instead: str
    error: str


def digest_of(ids: Iterable[tuple[str, str, int]]) -> str:
    """Digest of samples told by source, key and epoch."""
    digest = hashlib.blake2b(digest_size=8)
    for source, key, epoch in ids:
        digest.update(f"{source}\x1f{key}\x1f{epoch}\n".encode())
    return digest.hexdigest()


class Ledger:
    """Writes and reads the ledger of one stage."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._samples: Counter[str] = Counter()

    def opened(self, *, step: int, cursor: int, plan: str) -> None:
        """A run starts, or goes on after `step`.

        Raises:
            ValueError: the steps the run goes on from were planned otherwise.
        """
        before = [line["opened"] for line in read_lines(self.path) if "opened" in line]
        if step and before and before[-1]["plan"] != plan:
            raise ValueError(
                f"{self.path}: the first {step} steps followed the data order "
                f"{before[-1]['plan']}, this run would go on in {plan}: the samples, the data "
                "section, train.global_batch, train.seed, or the model or parts that learn have "
                "changed; put them back, or start the stage anew"
            )
        self._write({"opened": {"step": step, "cursor": cursor, "plan": plan}})
        self._samples = Counter(saved_samples(self.path, step))

    def step(self, step: int, record: BatchRecord) -> None:
        """One optimizer step has used a global batch."""
        self._samples.update(record.sources)
        self._write(
            {
                "step": step,
                "packs": list(record.packs),
                "samples": record.samples,
                "tokens": record.tokens,
                "ids": record.ids,
            }
        )

    def saved(self, step: int) -> None:
        """The weights after a step are on disk: what they have seen of each source."""
        self._write({"saved": step, "samples": dict(sorted(self._samples.items()))})

    @property
    def samples(self) -> dict[str, int]:
        """Samples used so far of each source."""
        return dict(sorted(self._samples.items()))

    def _write(self, record: dict[str, Any]) -> None:
        append_line(self.path, record)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one line of JSON, on a line of its own even after one that a kill cut short."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, 2)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines, oldest first; no file, no lines."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def lineage(path: Path) -> list[dict[str, Any]]:
    """The step lines that led to the latest weights, by step."""
    steps: dict[int, dict[str, Any]] = {}
    for line in read_lines(path):
        if "opened" in line:
            last = line["opened"]["step"]
            steps = {step: record for step, record in steps.items() if step <= last}
        elif "step" in line:
            steps[line["step"]] = line
    return [steps[step] for step in sorted(steps)]


def saved_samples(path: Path, step: int) -> dict[str, int]:
    """Samples of each source that the weights saved after `step` have seen."""
    found: dict[str, int] = {}
    for line in read_lines(path):
        if line.get("saved") == step:
            found = line["samples"]
    return found


class BadSamples:
    """Counts what cannot be decoded, by source, and says when it is too much. Thread-safe.

    Args:
        most: allowed share of a source's samples.

    Attributes:
        counts: bad samples of each source, each counted once.
    """

    def __init__(self, most: float) -> None:
        self.counts: Counter[str] = Counter()
        self._most = most
        self._good: Counter[str] = Counter()
        self._found: set[tuple[str, str]] = set()
        self._first: dict[str, str] = {}
        self._lock = threading.Lock()

    def good(self, source: str) -> None:
        """A sample was decoded."""
        with self._lock:
            self._good[source] += 1

    def bad(self, source: str, key: str, error: Exception) -> None:
        """A sample could not be decoded.

        Raises:
            BadDataError: nothing of the source could be, or more than is allowed could not.
        """
        said = f"sample {key} of source {source} cannot be decoded: {error}"
        with self._lock:
            first = self._first.setdefault(source, said)
            if (source, key) not in self._found:
                self._found.add((source, key))
                self.counts[source] += 1
            bad, good = self.counts[source], self._good[source]
        allowed = self._most * max(bad + good, LEAST_SEEN)
        if bad > allowed:
            raise BadDataError(
                f"{bad} of {bad + good} samples of source {source} cannot be decoded, "
                f"data.max_bad_fraction {self._most} allows {int(allowed)}; the first: {first}"
            ) from error
        if bad >= FIRST_LOOK and not good:
            raise BadDataError(
                f"the first {bad} samples of source {source} can all not be decoded, which is "
                f"the source's fault rather than theirs; the first: {first}"
            ) from error


def write_bad(path: Path, bad: BadSample) -> None:
    """Append one broken sample."""
    append_line(path, {"bad": asdict(bad)})
