"""Where the rows of a source file are, and how each is read.

The rows of a `.jsonl` file are its lines that are not blank; those of a `.json` file are the
elements of its list, told apart by brackets alone, so that one broken element loses no other; those
of a `.parquet` file are its rows. Row numbers count from 1; in a jsonl file they are line numbers.
Places are found once and kept as an array, so that any worker starts anywhere.

Refuses a json file whose top level is no list, or whose brackets or quotes do not close: from there
on no row can be told from the next. Costs about a second per gigabyte of jsonl, 20 of json.
"""

import json
import mmap
import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.convert.conversation import Fault, Reason

SUFFIXES = (".jsonl", ".json", ".parquet")
_MARK = b"\xef\xbb\xbf"
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[{}\[\]"]', re.DOTALL)
_GAP = b" \t\r\n,"
_PARQUET_BATCH = 64
_ROWS_A_PART = 50_000

Places = NDArray[np.int64]
"""(rows, 3): row number, first byte, bytes. Of a parquet file: row number, row group, bytes."""


def find_rows(path: Path, seen: Callable[[int], None] = lambda place: None) -> Places:
    """The places of a file's rows.

    Args:
        seen: is told now and then how many bytes were gone through.

    Raises:
        ValueError: the file is of none of the kinds, or no row of it can be told apart.
    """
    if path.suffix == ".jsonl":
        return _array(_lines(path), seen)
    if path.suffix == ".json":
        return _array(_elements(path), seen)
    if path.suffix == ".parquet":
        return _array(_parquet_rows(path), lambda place: None)
    raise ValueError(f"{path}: rows are read from {', '.join(SUFFIXES)} files")


def read_rows(path: Path, places: Places) -> Iterator[tuple[int, Any]]:
    """Row number and value of each of these rows; the value is a Fault where it cannot be read."""
    if path.suffix == ".parquet":
        yield from _read_parquet(path, places)
        return
    with path.open("rb") as file:
        for number, start, size in places.tolist():
            file.seek(start)
            yield number, parse(file.read(size))


def parse(data: bytes) -> Any:
    """The JSON of one row, or the Fault that it is."""
    try:
        row = json.loads(data)
    except (ValueError, RecursionError) as error:
        return Fault(Reason.BAD_JSON, str(error))
    if not isinstance(row, dict):
        return Fault(Reason.WRONG_TYPE, f"the row is a {type(row).__name__}, not an object")
    return row


def _array(places: Iterator[tuple[int, int, int]], seen: Callable[[int], None]) -> Places:
    parts = [np.empty((0, 3), dtype=np.int64)]
    while some := list(islice(places, _ROWS_A_PART)):
        parts.append(np.array(some, dtype=np.int64))
        seen(some[-1][1])
    return np.concatenate(parts)


def _lines(path: Path) -> Iterator[tuple[int, int, int]]:
    with path.open("rb") as file:
        start = len(_MARK) if file.read(len(_MARK)) == _MARK else 0
        file.seek(start)
        for number, line in enumerate(file, 1):
            if not line.isspace():
                yield number, start, len(line)
            start += len(line)


def _elements(path: Path) -> Iterator[tuple[int, int, int]]:
    """Elements of the list a file holds.

    What stands between two bracketed elements and is more than a comma is an element too, a faulty
    one: rows are objects.
    """
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty; a json source holds a list of rows")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        depth, number, start, behind = 0, 0, 0, 0
        for token in _TOKEN.finditer(text):
            mark = token[0]
            if mark == b'"':
                raise _unsplittable(path, number, "a quote that does not close", token.start())
            if mark in b"[{":
                if depth == 0 and (mark != b"[" or text[: token.start()].strip(b" \t\r\n" + _MARK)):
                    raise ValueError(f"{path} holds no list of rows at its top level")
                if depth == 0:
                    behind = token.end()
                if depth == 1:
                    start = token.start()
                depth += 1
            elif mark in b"]}":
                depth -= 1
                if depth <= 1:
                    edge = start if depth == 1 else token.start()
                    for place in _between(text, behind, edge):
                        number += 1
                        yield number, *place
                if depth == 1:
                    number += 1
                    yield number, start, token.end() - start
                    behind = token.end()
                if depth <= 0:
                    return
        raise _unsplittable(path, number, "a bracket that does not close", start)


def _unsplittable(path: Path, number: int, what: str, place: int) -> ValueError:
    return ValueError(
        f"{path}: {what} in row {number + 1}, near byte {place}; the rows behind it cannot be told "
        "apart. Mend that row, or write the file as jsonl, one row a line"
    )


def _between(text: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int]]:
    """The place of what stands between two elements, if it is more than commas."""
    gap = text[start:end]
    inside = gap.strip(_GAP)
    if inside:
        yield start + len(gap) - len(gap.lstrip(_GAP)), len(inside)


def _parquet_rows(path: Path) -> Iterator[tuple[int, int, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).metadata
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{path} is no parquet file that can be read: {error}") from error
    number = 0
    for group in range(table.num_row_groups):
        rows = table.row_group(group).num_rows
        size = table.row_group(group).total_byte_size // max(rows, 1)
        for _ in range(rows):
            number += 1
            yield number, group, size


def _read_parquet(path: Path, places: Places) -> Iterator[tuple[int, Any]]:
    """Rows of whole and partial row groups, a few at a time."""
    import pyarrow.parquet

    if not len(places):
        return
    wanted = set(places[:, 0].tolist())
    with pyarrow.parquet.ParquetFile(path) as file:
        groups = sorted(set(places[:, 1].tolist()))
        number = sum(file.metadata.row_group(group).num_rows for group in range(groups[0]))
        for batch in file.iter_batches(batch_size=_PARQUET_BATCH, row_groups=groups):
            for at in range(batch.num_rows):
                number += 1
                if number in wanted:
                    yield number, {name: batch[name][at].as_py() for name in batch.schema.names}
