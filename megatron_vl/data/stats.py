"""`mvl data stats`: how long samples are, how many tiles they take, what is cut or left out.

Of sources: every sample is fitted into the view's room, from its text and headers, no pixel
decoded. Of a stage: the length tables it trains with, and the packs it will read, planned and
counted: shares of the sources by samples and by tokens, how full packs are, how many tiles and
samples each holds. Costs 0.2 ms a sample for sources; seconds for a stage whose tables are there.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.encode import load_tokenizer
from megatron_vl.data.fit import WHOLE, Fitted, Room, fit_sample, headers_of
from megatron_vl.data.lengths import length_table
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.plan import DataEndedError
from megatron_vl.data.store import SourceStore
from megatron_vl.data.view import (
    Span,
    close_opened,
    loaded_tokenizer,
    open_view,
    opened,
    spans_of,
)
from megatron_vl.data.workers import advance, each

Columns = Mapping[str, NDArray[Any]]
Tell = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and of how much; 0 where that is not known."""

LENGTH_EDGES = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144)
TILE_EDGES = (0, 1, 2, 4, 7, 10, 13, 26, 52, 104, 208)
SAMPLE_EDGES = (1, 2, 4, 8, 16, 32, 64, 128)
"""Each entry of a histogram counts what is at most its edge, the last one what is more."""

_SPAN = 500
MOST_PACKS = 4096
"""Packs of a stage that are planned and counted."""
_ERRORS = 10
_COLUMNS = ("length", "tiles", "max_tiles", "kept_characters", "max_frames")


def histogram(values: NDArray[np.integer], edges: Iterable[int]) -> list[list[Any]]:
    """How many values are at most each edge and above the one before: `["<= 64", 12]` ..."""
    edges = np.array(list(edges))
    counts = np.bincount(np.searchsorted(edges, values), minlength=len(edges) + 1)
    names = [f"<= {edge}" for edge in edges] + [f"> {edges[-1]}"]
    filled = np.flatnonzero(counts)
    last = int(filled[-1]) + 1 if len(filled) else 0
    return [[name, int(count)] for name, count in zip(names[:last], counts, strict=False)]


def distribution(values: NDArray[np.integer]) -> dict[str, float]:
    """Sum, mean, quantiles and maximum; zeros where there are no values."""
    if len(values) == 0:
        return dict.fromkeys(("sum", "mean", "p50", "p90", "p99", "max"), 0)
    p50, p90, p99 = np.percentile(values, [50, 90, 99])
    return {
        "sum": int(values.sum()),
        "mean": round(float(values.mean()), 2),
        "p50": float(p50),
        "p90": float(p90),
        "p99": float(p99),
        "max": int(values.max()),
    }


def summarise(
    name: str,
    split: str,
    columns: Columns,
    room: Room,
    unreadable: int,
    errors: Sequence[str],
) -> dict[str, Any]:
    """What the samples of one source and split come to.

    Args:
        columns: numbers of `Fitted` by name, of the samples that could be read.
        unreadable: how many could not. errors: why, of the first of them.
    """
    fits = columns["length"] > 0
    lengths, tiles = columns["length"][fits], columns["tiles"][fits]
    return {
        "source": name,
        "split": split,
        "samples": len(fits) + unreadable,
        "fit": int(fits.sum()),
        "too_long": int((~fits).sum()),
        "unreadable": unreadable,
        "errors": list(errors[:_ERRORS]),
        "fewer_tiles": int((columns["max_tiles"][fits] < room.max_tiles).sum()),
        "fewer_frames": int((columns["max_frames"][fits] < room.video.max_frames).sum()),
        "text_cut": int((columns["kept_characters"][fits] != WHOLE).sum()),
        "tokens": distribution(lengths),
        "tiles": distribution(tiles),
        "tokens_histogram": histogram(lengths, LENGTH_EDGES),
        "tiles_histogram": histogram(tiles, TILE_EDGES),
    }


def source_stats(
    folders: Iterable[Path],
    stage: StageConfig | None,
    tokenizer: Path | None,
    *,
    workers: int = 1,
    tell: Tell = lambda doing, done, total: None,
) -> dict[str, Any]:
    """Statistics of sources as they are seen by a stage, or as published.

    Raises:
        ValueError: no tokenizer, or a source without samples.
    """
    spans = [span for folder in folders for span in spans_of(folder, _SPAN)]
    view = open_view(Path(spans[0].folder), stage, tokenizer)
    total = sum(len(span.places) for span in spans)
    parts = each(
        partial(_fit, str(view.path), view.room),
        spans,
        workers=workers,
        tell=lambda done: tell("reading samples", done, total),
    )
    found: dict[tuple[str, str], list[Columns]] = {}
    errors: dict[tuple[str, str], list[str]] = {}
    for span, (columns, broken) in zip(spans, parts, strict=True):
        where = Path(span.folder).name, span.split
        found.setdefault(where, []).append(columns)
        errors.setdefault(where, []).extend(broken)
    close_opened()
    entries = []
    for where, pieces in found.items():
        whole = {name: np.concatenate([piece[name] for piece in pieces]) for name in _COLUMNS}
        entries.append(summarise(*where, whole, view.room, len(errors[where]), errors[where]))
    return {"sequence_length": view.room.sequence_length, "sources": with_shares(entries)}


def _fit(tokenizer: str, room: Room, span: Span) -> tuple[Columns, list[str]]:
    """Samples as they fit, and what is wrong with those that cannot be read."""
    store, words = opened(span.folder, span.split), loaded_tokenizer(tokenizer)
    rows: list[Fitted] = []
    broken: list[str] = []
    for key in span.keys(store):
        advance()
        try:
            sample = store.sample(key)
            rows.append(fit_sample(sample, headers_of(sample), words, room))
        except Exception as error:  # whatever a broken row or header makes a reader do
            broken.append(f"{key}: {type(error).__name__}: {error}")
    columns = {
        name: np.array([getattr(row, name) for row in rows], dtype=np.int64) for name in _COLUMNS
    }
    return columns, broken


def with_shares(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The entries with their part of the samples and of the tokens of their split."""
    for entry in entries:
        same = [other for other in entries if other["split"] == entry["split"]]
        samples = sum(other["fit"] for other in same)
        tokens = sum(other["tokens"]["sum"] for other in same)
        entry["share_of_samples"] = round(entry["fit"] / max(samples, 1), 6)
        entry["share_of_tokens"] = round(entry["tokens"]["sum"] / max(tokens, 1), 6)
    return entries


def stage_stats(
    stage: StageConfig,
    *,
    workers: int = 1,
    tell: Tell = lambda doing, done, total: None,
) -> dict[str, Any]:
    """Statistics of what a stage trains on: its sources, and the first packs of its plan.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: the stage's blend cannot be read or planned.
    """
    tokenizer, room = load_tokenizer(stage), Room.of(stage)
    entries = []
    for source in sorted(stage.data.blend):
        store = SourceStore(stage.data.root, source, "train")
        table = length_table(
            store, tokenizer, room, workers=workers, progress=lambda line: tell(line, 0, 0)
        )
        store.close()
        read = np.asarray(table.columns["max_tiles"]) > 0  # 0 marks a sample that was not read
        columns = {name: np.asarray(table.columns[name])[read] for name in _COLUMNS}
        entries.append(summarise(source, "train", columns, room, table.bad, table.errors))
    return {
        "sequence_length": room.sequence_length,
        "sources": with_shares(entries),
        "plan": _planned(stage, tell),
    }


def _planned(stage: StageConfig, tell: Tell) -> dict[str, Any]:
    """The first packs of a stage's plan, counted."""
    loader = PackLoader(
        replace(stage, data=replace(stage.data, prefetch=0)), split="train", rank=0, size=1
    )
    count = min(stage.train.steps * stage.train.global_batch, MOST_PACKS)
    packs: list[tuple[int, int, int]] = []
    samples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    try:
        for number in range(count):
            members = loader.planned(number)
            lengths = [member.length for member in members]
            packs.append((sum(lengths), sum(member.tiles for member in members), len(members)))
            for member in members:
                samples[member.source] += 1
                tokens[member.source] += member.length
            tell("planning packs", number + 1, count)
    except DataEndedError:
        pass  # the blend ends before the stage does; what there is was counted
    finally:
        loader.close()
    filled = np.array(packs, dtype=np.int64).reshape(-1, 3)
    most = stage.data.sequence_length * max(len(packs), 1)
    return {
        "packs": len(packs),
        "fill": round(float(filled[:, 0].sum()) / most, 6),
        "samples": _shares(samples),
        "tokens": _shares(tokens),
        "tiles_a_pack": distribution(filled[:, 1]),
        "samples_a_pack": distribution(filled[:, 2]),
        "tiles_a_pack_histogram": histogram(filled[:, 1], TILE_EDGES),
        "samples_a_pack_histogram": histogram(filled[:, 2], SAMPLE_EDGES),
    }


def _shares(counts: Mapping[str, int]) -> dict[str, float]:
    total = max(sum(counts.values()), 1)
    return {source: round(counts[source] / total, 6) for source in sorted(counts)}
