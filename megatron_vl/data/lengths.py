"""Length tables: how long every sample of a source is, made once and kept beside the data.

    ROOT/lengths/SOURCE-SPLIT-DIGEST/   one .npy a column: key and every number of `Fitted`
                                        meta.json: how many samples, which could not be read

The name changes with everything that lengths depend on: the source, the tokenizer, tiling, the
sequence length, the code. Only text and headers are read, no pixel is decoded. A sample whose row
or media header is broken gets length 0 and is counted; a source whose first samples all fail is
refused at once, as its cooker must be wrong.

Cost: about a second for 5000 samples and process; opening a table reads two of its columns. Whoever
comes first makes a table, others wait for it; where the root cannot be written each makes its own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl import sequence
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.blend import SourceTable
from megatron_vl.data.encode import load_tokenizer
from megatron_vl.data.fit import Fitted, Room, fit_sample, headers_of
from megatron_vl.data.index import SPLITS
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.data.workers import each

_TABLE_VERSION = 2
_CHUNK = 2000
"""Samples a process takes at a time, and between two lines of progress."""
_WORTH_PROCESSES = 20_000
"""Samples from which starting processes pays."""
FIRST_LOOK = 16
"""A source whose first samples, this many, are all broken is refused."""
_ERRORS_KEPT = 10
_DECIDING = (
    *("chat", "fit", "frames", "headers", "native", "seeds", "store", "tokenizer"),
    *("convert/conversation", "convert/parts"),
)
"""Modules beside this one whose code decides on lengths."""

Progress = Callable[[str], None]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class LengthTable:
    """The samples of one source and split, by their place in it.

    columns: the numbers of `Fitted`, by name, and `key`; read from disk as they are touched.
    bad: samples that could not be read; errors: the first of their messages, with the key.
    """

    columns: Columns
    bad: int
    errors: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.columns["key"])

    def key(self, index: int) -> str:
        """The key of a sample."""
        return bytes(self.columns["key"][index]).decode()

    def fitted(self, index: int) -> Fitted:
        """How a sample is encoded."""
        numbers = {
            name: column[index].item() for name, column in self.columns.items() if name != "key"
        }
        return Fitted(key=self.key(index), **numbers)

    @property
    def sizes(self) -> SourceTable:
        """What the planner needs."""
        return SourceTable(np.asarray(self.columns["length"]), np.asarray(self.columns["tiles"]))

    @property
    def mean_length(self) -> float:
        """Tokens of a sample that fits, on average; 0 where none does."""
        lengths = np.asarray(self.columns["length"])
        return float(lengths[lengths > 0].mean()) if (lengths > 0).any() else 0.0


def build_length_tables(
    config: StageConfig, *, workers: int = 1, progress: Progress = print
) -> None:
    """Make the tables of every source a stage draws from, both splits, where they are missing.

    Args:
        workers: processes for large sources.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: see `length_table`.
    """
    tokenizer, room = load_tokenizer(config), Room.of(config)
    for source in config.data.blend:
        for split in SPLITS:
            store = SourceStore(config.data.root, source, split)
            try:
                length_table(store, tokenizer, room, workers=workers, progress=progress)
            finally:
                store.close()


def length_table(
    store: SourceStore,
    tokenizer: Tokenizer,
    room: Room,
    *,
    workers: int = 1,
    progress: Progress | None = None,
) -> LengthTable:
    """The table of a source and room, from beside the data if it is there.

    Raises:
        ValueError: the first samples are all broken.
    """
    folder = _table_folder(store, room)
    found = _read(folder)
    if found is not None:
        return found
    with _alone(folder):
        found = _read(folder)  # somebody else may have made it meanwhile
        if found is None:
            found = _make(store, tokenizer, room, workers, progress or (lambda line: None))
            _write_if_possible(folder, found)
    return found


def _make(
    store: SourceStore, tokenizer: Tokenizer, room: Room, workers: int, progress: Progress
) -> LengthTable:
    """Fit every sample."""
    total, started = len(store.keys), time.monotonic()
    spans = [range(at, min(at + _CHUNK, total)) for at in range(0, total, _CHUNK)]
    parts: list[Columns] = []
    errors: list[str] = []
    done = 0
    fit: Callable[[range], tuple[Columns, dict[int, str]]]
    if total < _WORTH_PROCESSES:
        workers, fit = 1, partial(_fit_span, store, tokenizer, room)
    else:
        fit = partial(_fit_in_process, str(store.folder.parent), store.source, store.split, room)
    for columns, broken in each(fit, spans, workers=workers):
        if not parts and set(range(min(len(columns["key"]), FIRST_LOOK))) <= broken.keys():
            raise ValueError(
                f"the first samples of {store.folder} can all not be read, which is the source's "
                f"fault rather than theirs: {broken[0]}"
            )
        parts.append(columns)
        errors += broken.values()
        done += len(columns["key"])
        rate = done / max(time.monotonic() - started, 1e-9)
        progress(f"lengths of {store.source} {store.split}: {done} of {total}, {rate:.0f} a second")
    whole = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return LengthTable(whole, len(errors), tuple(errors[:_ERRORS_KEPT]))


def _fit_in_process(
    root: str, source: str, split: str, room: Room, span: range
) -> tuple[Columns, dict[int, str]]:
    store, tokenizer = _opened(root, source, split)
    return _fit_span(store, tokenizer, room, span)


@lru_cache(maxsize=1)
def _opened(root: str, source: str, split: str) -> tuple[SourceStore, Tokenizer]:
    """What a process reads from, opened once."""
    return SourceStore(root, source, split), Tokenizer.load(Path(root) / TOKENIZER_FILE)


def _fit_span(
    store: SourceStore, tokenizer: Tokenizer, room: Room, span: range
) -> tuple[Columns, dict[int, str]]:
    """Fit some samples: their columns, and what is wrong with the broken, which have length 0."""
    rows: list[Fitted] = []
    broken: dict[int, str] = {}
    for place, key in enumerate(store.keys[span.start : span.stop]):
        try:
            sample = store.sample(key)
            rows.append(fit_sample(sample, headers_of(sample), tokenizer, room))
        except Exception as error:  # whatever a broken row or header makes a reader do
            broken[place] = f"{key}: {type(error).__name__}: {error}"
            rows.append(Fitted(key, 0, 0, 0))
    return _columns(rows), broken


def _columns(rows: Sequence[Fitted]) -> Columns:
    """The rows as arrays, keys as bytes of one width."""
    columns: Columns = {}
    for field in fields(Fitted):
        values = [getattr(row, field.name) for row in rows]
        if field.name == "key":
            columns["key"] = np.array([key.encode() for key in values], dtype=np.bytes_)
            continue
        column = np.array(values)
        assert column.ndim == 1
        assert column.dtype.kind in "ifb", f"Fitted.{field.name} is no number"
        if column.dtype.kind == "i" and np.abs(column).max() < 1 << 31:
            column = column.astype(np.int32)
        columns[field.name] = column
    return columns


def _table_folder(store: SourceStore, room: Room) -> Path:
    """A table's folder: its name changes with everything that lengths depend on."""
    root, here = store.folder.parent, Path(__file__).parent
    digest = hashlib.sha256(repr((_TABLE_VERSION, room, store.identity)).encode())
    digest.update((root / TOKENIZER_FILE).read_bytes())
    code = sorted(Path(sequence.__path__[0]).glob("*.py"))
    code += [here / f"{name}.py" for name in _DECIDING]
    for file in code:
        digest.update(file.read_bytes())
    return root / "lengths" / f"{store.source}-{store.split}-{digest.hexdigest()[:16]}"


def _read(folder: Path) -> LengthTable | None:
    """A table; None where there is none or not a whole one."""
    try:
        meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        columns = {
            field.name: np.load(folder / f"{field.name}.npy", mmap_mode="r")
            for field in fields(Fitted)
        }
        return LengthTable(columns, int(meta["bad"]), tuple(meta["errors"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold the table's lock, where the root can be written and the file system has locks."""
    try:
        folder.parent.mkdir(exist_ok=True)
        handle = open(folder.with_name(folder.name + ".lock"), "w")  # noqa: SIM115
    except OSError:
        yield
        return
    with handle:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _write_if_possible(folder: Path, table: LengthTable) -> None:
    """Write a table whole, or not at all where the data root cannot be written."""
    part = folder.with_name(f"{folder.name}.{os.getpid()}.part")
    meta = {"samples": len(table), "bad": table.bad, "errors": list(table.errors)}
    with contextlib.suppress(OSError):
        shutil.rmtree(part, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        part.mkdir(parents=True)
        for name, column in table.columns.items():
            np.save(part / f"{name}.npy", column)
        (part / "meta.json").write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
        os.rename(part, folder)
