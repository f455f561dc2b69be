"""How long every sample is, and what gives way when it is longer than a sequence.

Lengths come from the text and from image sizes; no pixel is decoded. A sample that is too long gets
fewer tiles, step by step; then its document text loses its end; what still does not fit is left out
and counted. Questions and answers are never cut: document text is a text part that another text
part of the same system or user message follows.

The table of a source is computed once for a tokenizer, template, tiling and sequence length (about
a second per 5000 samples) and kept beside the data.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import chat
from megatron_vl.data import tokenizer as tokenizer_module
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.store import Sample, SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.sequence import counts as counts_module
from megatron_vl.sequence import grids as grids_module
from megatron_vl.sequence.counts import TAGS_PER_IMAGE, image_token_counts, tokens_per_tile
from megatron_vl.sequence.grids import tile_limits

WHOLE = -1
"""kept_characters of a sample whose text is not cut."""

_TABLE_VERSION = 1


@dataclass(frozen=True)
class Room:
    """What a sample has to fit into. [tokens; pixels; pixels; tiles]"""

    sequence_length: int
    tile_size: int
    patch_size: int
    max_tiles: int

    @classmethod
    def of(cls, config: StageConfig) -> "Room":
        """The room a stage gives its samples."""
        return cls(
            sequence_length=config.data.sequence_length,
            tile_size=config.data.tile_size,
            patch_size=config.model.encoder.patch_size,
            max_tiles=config.data.max_tiles,
        )

    @property
    def tokens_per_tile(self) -> int:
        """Decoder tokens of one tile."""
        return tokens_per_tile(self.tile_size, self.patch_size)

    def image_tokens(self, sizes: Sequence[tuple[int, int]], max_tiles: int) -> list[int]:
        """`<image>` tokens of images at a tile limit."""
        return image_token_counts(
            sizes, tile_size=self.tile_size, patch_size=self.patch_size, max_tiles=max_tiles
        )


@dataclass(frozen=True)
class Fitted:
    """A sample as it will be encoded.

    length: its tokens; 0 if it does not fit. tiles: of all its images.
    max_tiles: tile limit of its images. kept_characters: of its document text, or WHOLE.
    """

    key: str
    length: int
    tiles: int
    max_tiles: int
    kept_characters: int = WHOLE


def document_part(messages: Sequence[dict[str, Any]]) -> tuple[int, int] | None:
    """Message and part index of the longest document text, None if there is none."""
    best: tuple[int, int] | None = None
    longest = 0
    for place, message in enumerate(messages):
        if message["role"] == "assistant" or isinstance(message["content"], str):
            continue
        texts = [at for at, part in enumerate(message["content"]) if part["type"] == "text"]
        for at in texts[:-1]:
            size = len(message["content"][at]["text"])
            if size > longest:
                best, longest = (place, at), size
    return best


def shorten(messages: Sequence[dict[str, Any]], kept_characters: int) -> list[dict[str, Any]]:
    """The messages with that many characters of their document text."""
    place = document_part(messages)
    if kept_characters == WHOLE or place is None:
        return list(messages)
    message = messages[place[0]]
    parts = list(message["content"])
    part = parts[place[1]]
    parts[place[1]] = {**part, "text": part["text"][:kept_characters]}
    return [*messages[: place[0]], {**message, "content": parts}, *messages[place[0] + 1 :]]


def fit_sample(
    sample: Sample, sizes: Sequence[tuple[int, int]], tokenizer: Tokenizer, room: Room
) -> Fitted:
    """How a sample is encoded within a room; length 0 if it cannot be."""
    no_image_tokens = [0] * len(sizes)
    text = len(chat.encode_conversation(sample.messages, tokenizer, no_image_tokens))
    for limit in tile_limits(room.max_tiles) if sizes else (room.max_tiles,):
        counts = room.image_tokens(sizes, limit)
        length, tiles = text + sum(counts), sum(counts) // room.tokens_per_tile
        if length <= room.sequence_length:
            return Fitted(sample.key, length, tiles, limit)
    place = document_part(sample.messages)
    if place is None:
        return Fitted(sample.key, 0, tiles, limit)
    document = sample.messages[place[0]]["content"][place[1]]["text"]
    keep = len(tokenizer.encode(document)) - (length - room.sequence_length)
    while keep > 0:
        kept = tokenizer.prefix(document, keep)
        messages = shorten(sample.messages, kept)
        text = len(chat.encode_conversation(messages, tokenizer, no_image_tokens))
        excess = text + sum(counts) - room.sequence_length
        if excess <= 0:
            return Fitted(sample.key, text + sum(counts), tiles, limit, kept)
        keep -= excess
    return Fitted(sample.key, 0, tiles, limit)


def fit_source(store: SourceStore, tokenizer: Tokenizer, room: Room) -> list[Fitted]:
    """`fit_sample` of every sample of a source, from the table beside the data if there is one."""
    table = _table_path(store, room)
    try:
        rows = json.loads(table.read_text(encoding="utf-8"))
        return [Fitted(*row) for row in rows]
    except (OSError, ValueError, TypeError):
        pass
    fitted = []
    for key in store.keys:
        sample = store.sample(key)
        try:
            fitted.append(fit_sample(sample, store.image_sizes(sample), tokenizer, room))
        except (ValueError, KeyError) as error:
            raise ValueError(f"sample {key} of {store.folder}: {error}") from error
    rows = [[f.key, f.length, f.tiles, f.max_tiles, f.kept_characters] for f in fitted]
    _write_if_possible(table, json.dumps(rows))
    return fitted


def _table_path(store: SourceStore, room: Room) -> Path:
    """A table's file: its name changes with everything that lengths depend on."""
    root = store.folder.parent
    digest = hashlib.sha256(repr((_TABLE_VERSION, TAGS_PER_IMAGE, room, store.identity)).encode())
    digest.update((root / TOKENIZER_FILE).read_bytes())
    for module in (chat, tokenizer_module, counts_module, grids_module):
        digest.update(Path(str(module.__file__)).read_bytes())
    digest.update(Path(__file__).read_bytes())
    return root / "lengths" / f"{store.source}-{store.split}-{digest.hexdigest()[:16]}.json"


def _write_if_possible(path: Path, text: str) -> None:
    """Write a file whole, or not at all where the data root cannot be written."""
    part = path.with_suffix(f".{os.getpid()}.part")
    try:
        path.parent.mkdir(exist_ok=True)
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError:
        pass
