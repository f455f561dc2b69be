"""`mvl data inspect`: samples as the model meets them, on one page that needs no network.

Each image with the grid it is cut along, each video by some of its frames, the prompt token by
token with the tokens that are trained on coloured by turn, and what gave way for the sample to fit.
A sample that cannot be read stands on the page with its error.

Costs one decode of every image shown, and about 150 kB of page for it.
"""

import base64
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from PIL import Image

from megatron_vl.data import chat
from megatron_vl.data.chat import Visual
from megatron_vl.data.fit import WHOLE, Fitted, Header, Room, fit_sample, headers_of, shorten
from megatron_vl.data.frames import Clip
from megatron_vl.data.headers import VideoHeader
from megatron_vl.data.store import Sample, SourceStore
from megatron_vl.data.tiling import decode_image
from megatron_vl.data.tokenizer import IMAGE, Tokenizer
from megatron_vl.data.video import read_frames
from megatron_vl.data.view import View
from megatron_vl.sequence.layout import UNSUPERVISED, Document

_PAGE = Path(__file__).with_name("inspect.html.jinja")
_EDGE = 640
"""Longest edge of an image on the page. [pixels]"""
_FRAME_EDGE = 200
_FRAMES = 8
"""Most frames of a video on the page."""


@dataclass(frozen=True)
class Word:
    """A token on the page, or a run of equal ones.

    style: "special" or "plain", and "turn-N" where it is trained on.
    """

    text: str
    ids: str
    style: str
    count: int = 1


@dataclass(frozen=True)
class Picture:
    """An image or video on the page: its frames as data URLs, and the lines of its grid."""

    title: str
    frames: Sequence[tuple[str, str]]
    width: int
    height: int
    columns: int = 1
    rows: int = 1


@dataclass(frozen=True)
class Card:
    """One sample on the page."""

    key: str
    source: str
    split: str
    facts: Sequence[tuple[str, str]] = ()
    pictures: Sequence[Picture] = ()
    words: Sequence[Word] = ()
    error: str = ""


def render(cards: Sequence[Card], title: str) -> str:
    """The page."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(_PAGE.read_text(encoding="utf-8"))
    return template.render(cards=cards, title=title)


def cards_of(store: SourceStore, keys: Sequence[str], view: View) -> Iterator[Card]:
    """Samples of a store as cards; one that cannot be read has its error.

    Raises:
        ValueError: the source has no such key.
    """
    known = set(store.keys)
    for key in keys:
        if key not in known:
            raise ValueError(f"{store.folder} has no sample {key!r} in its {store.split} split")
        try:
            yield _card(store, key, view)
        except Exception as error:  # whatever a broken row or medium makes a reader do
            text = f"{type(error).__name__}: {error}"
            yield Card(key, store.source, store.split, error=text)


def spread(keys: Sequence[str], count: int) -> list[str]:
    """`count` keys, evenly spread."""
    count = min(count, len(keys))
    return [keys[at * len(keys) // count] for at in range(count)]


def _card(store: SourceStore, key: str, view: View) -> Card:
    sample = store.sample(key)
    headers = headers_of(sample)
    fitted = fit_sample(sample, headers, view.tokenizer, view.room)
    visuals = view.room.visuals(
        headers, fitted.limits, view.room.video.rate(sample.source, sample.key)
    )
    messages = shorten(sample.messages, fitted.kept_characters)
    document = chat.encode_conversation(messages, view.tokenizer, visuals)
    pictures = [
        _picture(data, header, visual, fitted, view.room)
        for data, header, visual in zip(sample.media(), headers, visuals, strict=True)
    ]
    return Card(
        key,
        sample.source,
        store.split,
        tuple(_facts(sample, fitted, document, view.room)),
        pictures,
        tuple(words_of(document, view.tokenizer)),
    )


def _facts(
    sample: Sample, fitted: Fitted, document: Document, room: Room
) -> Iterator[tuple[str, str]]:
    trained = int((document.turn_ids_N != UNSUPERVISED).sum())
    turns = len(set(document.turn_ids_N.tolist()) - {UNSUPERVISED})
    yield "tokens", f"{len(document)} of at most {room.sequence_length}"
    yield "trained on", f"{trained} tokens in {turns} turn{'s' * (turns != 1)}"
    yield "tiles", str(fitted.tiles)
    if fitted.length == 0:
        yield "does not fit", "left out of training"
    if fitted.max_tiles < room.max_tiles:
        yield "fewer tiles", f"at most {fitted.max_tiles} an image, to fit"
    if chat.visual_parts(sample.messages) and fitted.max_frames < room.video.max_frames:
        yield "fewer frames", f"at most {fitted.max_frames} a video, to fit"
    if fitted.kept_characters != WHOLE:
        yield "text cut", f"its document keeps {fitted.kept_characters} characters"


def words_of(document: Document, tokenizer: Tokenizer) -> Iterator[Word]:
    """The tokens of a document as the page shows them, runs of `<image>` as one."""
    image, special = tokenizer.id_of(IMAGE), tokenizer.special_ids
    ids, turns = document.tokens_N.tolist(), document.turn_ids_N.tolist()
    at = 0
    while at < len(ids):
        end = at + 1
        while ids[at] == image and end < len(ids) and ids[end] == image:
            end += 1
        style = "special" if ids[at] in special else "plain"
        if turns[at] != UNSUPERVISED:
            style = f"{style} turn-{turns[at] % 4}"
        yield Word(tokenizer.decode(ids[at : at + 1]), str(ids[at]), style, end - at)
        at = end


def _picture(data: bytes, header: Header, visual: Visual, fitted: Fitted, room: Room) -> Picture:
    if isinstance(visual, Clip):
        assert isinstance(header, VideoHeader)
        return _video(data, header, visual)
    assert not isinstance(header, VideoHeader)
    image = Image.fromarray(decode_image(data))
    tokens = sum(grid.tokens for grid in visual)
    size = f"{image.width} x {image.height}"
    shown = [("", _data_url(image, _EDGE))]
    if not room.in_tiles:
        (grid,) = visual
        title = f"{size}: {grid.columns} x {grid.rows} patches, {tokens} tokens"
        return Picture(title, shown, image.width, image.height)
    tiles = room.tile_grid(header, fitted.max_tiles)
    thumbnail = ", one a thumbnail of all" if tiles.cells > 1 else ""
    title = (
        f"{size}: {tiles.cols} x {tiles.rows} grid, {tiles.num_tiles} tiles{thumbnail}, "
        f"{tokens} tokens"
    )
    return Picture(title, shown, image.width, image.height, tiles.cols, tiles.rows)


def _video(data: bytes, header: VideoHeader, clip: Clip) -> Picture:
    chosen = [at * len(clip.frames) // _FRAMES for at in range(_FRAMES)]
    places = sorted(set(chosen)) if len(clip.frames) > _FRAMES else range(len(clip.frames))
    numbers = [clip.frames[place] for place in places]
    pixels = read_frames(data, numbers, header)
    frames = [
        (clip.labels[place].strip(), _data_url(Image.fromarray(frame), _FRAME_EDGE))
        for place, frame in zip(places, pixels, strict=True)
    ]
    whole = len(clip.frames) * clip.grid.tokens
    title = (
        f"{header.width} x {header.height}, {header.duration:.2f} s, {header.num_frames} frames at "
        f"{header.fps:.2f} a second: {len(clip.frames)} shown, {clip.kept} of {whole} tokens kept"
    )
    return Picture(title, frames, header.width, header.height)


def _data_url(image: Image.Image, edge: int) -> str:
    small = image.copy()
    small.thumbnail((edge, edge))
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(stream.getvalue()).decode()


def facts_table(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """The cards' keys, facts and errors, for a terminal."""
    return [
        {"source": card.source, "key": card.key, **dict(card.facts), "error": card.error}
        for card in cards
    ]
