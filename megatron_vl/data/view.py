"""Which sources a command looks at, and through which eyes: tokenizer, tiling, sequence length.

A folder is a prepared source, or holds several. The view is a stage's, or else that of the
published 12B recipe with the tokenizer that lies beside the data.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.fit import Room
from megatron_vl.data.index import META, SPLITS
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import Tokenizer

PUBLISHED = Room(sequence_length=16384, tile_size=512, patch_size=16, max_tiles=12)
"""The view of the published stage 1."""


@dataclass(frozen=True)
class View:
    """How samples are tokenised and tiled, and what they have to fit into.

    path: of the tokenizer, for processes that load it themselves.
    """

    path: Path
    tokenizer: Tokenizer
    room: Room


def source_folders(data: Path) -> list[Path]:
    """The sources a folder is or holds.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: it is none and holds none.
    """
    if not data.is_dir():
        raise FileNotFoundError(2, "no such folder of prepared data", str(data))
    if (data / META / "index.sqlite").is_file():
        return [data.absolute()]
    found = sorted(path.parent.parent.absolute() for path in data.glob(f"*/{META}/index.sqlite"))
    if not found:
        raise ValueError(
            f"{data} is no prepared source and holds none; public sets are made into sources with "
            "`mvl data convert`, folders of tar files with `mvl data prepare`"
        )
    return found


def open_splits(folder: Path) -> list[SourceStore]:
    """The splits of a source that have samples.

    Raises:
        ValueError: none has.
    """
    stores, problems = [], []
    for split in SPLITS:
        try:
            stores.append(SourceStore(folder.parent, folder.name, split))
        except ValueError as error:
            problems.append(str(error))
    if not stores:
        raise ValueError("; ".join(problems))
    return stores


def open_view(folder: Path, stage: StageConfig | None, tokenizer: Path | None) -> View:
    """The view of a source.

    Args:
        folder: the source's.
        stage: whose sizes count; the published ones if None.
        tokenizer: a tokenizer.json; if None the one beside the data, or the stage's.

    Raises:
        ValueError: there is no tokenizer.
    """
    room = PUBLISHED if stage is None else Room.of(stage)
    candidates = [folder.parent / TOKENIZER_FILE, folder / TOKENIZER_FILE]
    if stage is not None:
        candidates.insert(0, Path(stage.data.root) / TOKENIZER_FILE)
    if tokenizer is not None:
        candidates = [tokenizer]
    for path in candidates:
        if path.is_file():
            return View(path, Tokenizer.load(path), room)
    raise ValueError(
        f"no tokenizer at {', '.join(map(str, candidates))}; name one with --tokenizer, or a stage "
        "file with --stage"
    )


@dataclass(frozen=True)
class Span:
    """Some samples of one split of a source, small enough to be handed to a process."""

    folder: str
    split: str
    places: range

    def keys(self, store: SourceStore) -> tuple[str, ...]:
        """Their keys."""
        return store.keys[self.places.start : self.places.stop]


def spans_of(folder: Path, size: int) -> list[Span]:
    """All samples of a source, `size` at a time, split after split.

    Raises:
        ValueError: it has none.
    """
    spans = []
    for store in open_splits(folder):
        for at in range(0, len(store.keys), size):
            places = range(at, min(at + size, len(store.keys)))
            spans.append(Span(str(folder), store.split, places))
        store.close()
    return spans


@lru_cache(maxsize=1)
def opened(folder: str, split: str) -> SourceStore:
    """The store a process reads spans from; the last one stays open."""
    path = Path(folder)
    return SourceStore(path.parent, path.name, split)


@lru_cache(maxsize=1)
def loaded_tokenizer(path: str) -> Tokenizer:
    """The tokenizer a process uses; the last one stays loaded."""
    return Tokenizer.load(path)


def close_opened() -> None:
    """Let go of what this process holds open."""
    opened.cache_clear()
    loaded_tokenizer.cache_clear()
