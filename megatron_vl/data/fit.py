"""How long every sample is, and what gives way when it is longer than a sequence.

Lengths come from the text and from the headers of images and videos; no pixel is decoded. A sample
that is too long gets fewer tiles, step by step (a whole image a smaller size, in the same steps);
then its videos get half the frames, again and again; then its document text loses its end; what
still does not fit is left out and counted. Questions and answers are never cut: document text is a
text part that another text part of the same system or user message follows.

`lengths.py` keeps what comes out in a table beside the data.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import Tiling
from megatron_vl.data import chat
from megatron_vl.data.chat import Visual
from megatron_vl.data.frames import Clip, VideoRules
from megatron_vl.data.headers import VideoHeader, image_header, video_header
from megatron_vl.data.store import Sample
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.sequence.counts import PIXEL_SHUFFLE
from megatron_vl.sequence.grids import Grid, tile_grid, tile_limits
from megatron_vl.sequence.native import matched_grid, native_grid
from megatron_vl.sequence.visual import PatchGrid

ImageSize = tuple[int, int]
"""Width and height of an upright image. [pixels]"""

Header = ImageSize | VideoHeader

WHOLE = -1
"""kept_characters of a sample whose text is not cut."""


@dataclass(frozen=True)
class Limits:
    """What a sample's pictures may have. [tiles of an image; frames of a video]"""

    tiles: int
    frames: int


@dataclass(frozen=True)
class Room:
    """What a sample has to fit into, and how its pictures are shown.

    Attributes:
        sequence_length: of a pack. [tokens]
        tile_size, patch_size: edges. [pixels]
        max_tiles: of an image, its thumbnail not counted. [tiles]
        tiling: tiles or whole images.
        min_patches, max_patches: of a whole image at its own resolution. [patches]
        position_grid: longest edge of a whole image. [patches]
        video: rules of frames.
        most_tiles: of all pictures of a sample, see `tiles_of`; 0 is no limit. [tiles]
    """

    sequence_length: int
    tile_size: int
    patch_size: int
    max_tiles: int
    tiling: Tiling = Tiling.published
    min_patches: int = 256
    max_patches: int = 12288
    position_grid: int = 128
    video: VideoRules = field(default_factory=VideoRules)
    most_tiles: int = 0

    @classmethod
    def of(cls, config: StageConfig) -> "Room":
        """The room a stage gives its samples."""
        return cls(
            sequence_length=config.data.sequence_length,
            tile_size=config.data.tile_size,
            patch_size=config.model.encoder.patch_size,
            max_tiles=config.data.max_tiles,
            tiling=config.data.tiling,
            min_patches=config.data.min_patches,
            max_patches=config.data.max_patches,
            position_grid=config.model.encoder.position_grid,
            video=VideoRules.of(config),
            most_tiles=config.data.max_tiles_per_pack,
        )

    @property
    def limits(self) -> Limits:
        """What pictures may have where the sample is short enough."""
        return Limits(self.max_tiles, self.video.max_frames)

    @property
    def in_tiles(self) -> bool:
        """Whether images are cut into tiles rather than shown whole."""
        return self.tiling in (Tiling.published, Tiling.area_weighted)

    @property
    def tile(self) -> PatchGrid:
        """Patches of one tile or frame."""
        edge = self.tile_size // self.patch_size
        return PatchGrid(edge, edge)

    def steps(self, headers: Sequence[Header]) -> Iterator[Limits]:
        """Limits to try one after the other, for the kinds of pictures that are there."""
        videos = [isinstance(header, VideoHeader) for header in headers]
        tiles = (self.max_tiles,) if all(videos) else tile_limits(self.max_tiles)
        yield from (Limits(limit, self.video.max_frames) for limit in tiles)
        if any(videos):
            yield from (Limits(tiles[-1], limit) for limit in self.video.limits()[1:])

    def tile_grid(self, size: ImageSize, max_tiles: int) -> Grid:
        """Columns and rows of tiles that an image is cut into."""
        return tile_grid(
            *size,
            tile_size=self.tile_size,
            max_tiles=max_tiles,
            area_weighted=self.tiling is Tiling.area_weighted,
        )

    def image_grids(self, size: ImageSize, max_tiles: int) -> tuple[PatchGrid, ...]:
        """Patches of each of an image's units: its tiles, or all of it.

        A whole image's budget of patches shrinks with the limit, in the same proportion.
        """
        if self.in_tiles:
            return (self.tile,) * self.tile_grid(size, max_tiles).num_tiles
        edge = self.position_grid
        if self.tiling is Tiling.native_matched:
            tokens = self.tile.tokens * self.tile_grid(size, max_tiles).num_tiles
            return (matched_grid(*size, tokens=tokens, max_edge=edge),)
        most = max(self.max_patches * max_tiles // self.max_tiles, PIXEL_SHUFFLE**2)
        return (
            native_grid(
                *size,
                patch_size=self.patch_size,
                min_patches=min(self.min_patches, most),
                max_patches=most,
                max_edge=edge,
            ),
        )

    def visuals(self, headers: Sequence[Header], limits: Limits, rate: float) -> list[Visual]:
        """How pictures are shown at given limits; `rate` of a video's embeddings is pruned."""
        return [
            self.video.clip(header, limits.frames, self.tile, rate)
            if isinstance(header, VideoHeader)
            else self.image_grids(header, limits.tiles)
            for header in headers
        ]

    def tiles_of(self, visuals: Sequence[Visual]) -> int:
        """The encoder's patches in tiles: a frame is one, a whole image may be several."""
        patches = 0
        for visual in visuals:
            if isinstance(visual, Clip):
                patches += visual.grid.patches * len(visual.frames)
            else:
                patches += sum(grid.patches for grid in visual)
        return -(-patches // self.tile.patches)


@dataclass(frozen=True)
class Fitted:
    """A sample as it will be encoded.

    length: its tokens; 0 if it does not fit. tiles: of all its pictures, see `Room.tiles_of`.
    max_tiles: tile limit of its images. kept_characters: of its document text, or WHOLE.
    max_frames: frame limit of its videos.
    """

    key: str
    length: int
    tiles: int
    max_tiles: int
    kept_characters: int = WHOLE
    max_frames: int = 0

    @property
    def limits(self) -> Limits:
        """What its pictures may have."""
        return Limits(self.max_tiles, self.max_frames)


def headers_of(sample: Sample) -> list[Header]:
    """Sizes of a sample's images and headers of its videos: from its row, or else from the files.

    Raises:
        ValueError: a header that cannot be read.
        KeyError: a medium that is not there.
    """
    return [_header(part, sample) for part in chat.visual_parts(sample.messages)]


def _header(part: Mapping[str, Any], sample: Sample) -> Header:
    known = part.get("metadata") or {}
    if part["type"] == "image" and "width" in known and "height" in known:
        return int(known["width"]), int(known["height"])
    stated = {name: known.get(f"video_{name}", 0) for name in VideoHeader.__dataclass_fields__}
    if all(isinstance(value, int | float) and value > 0 for value in stated.values()):
        return VideoHeader(**stated)
    return media_header(part["type"], sample.read_media(part[part["type"]]))


def media_header(kind: str, data: bytes) -> Header:
    """Size of an image, or header of a video.

    Raises:
        ValueError: it cannot be read.
    """
    if kind == "video":
        return video_header(data)
    image = image_header(data)
    return image.width, image.height


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
    sample: Sample, headers: Sequence[Header], tokenizer: Tokenizer, room: Room
) -> Fitted:
    """How a sample is encoded within a room; length 0 if it cannot be."""
    text = chat.text_length(sample.messages, tokenizer)
    rate = room.video.rate(sample.source, sample.key)
    for limits in room.steps(headers):
        visuals = room.visuals(headers, limits, rate)
        shown = sum(chat.visual_length(visual, tokenizer) for visual in visuals)
        tiles = room.tiles_of(visuals)
        few = not 0 < room.most_tiles < tiles
        if few and text + shown <= room.sequence_length:
            return Fitted(sample.key, text + shown, tiles, limits.tiles, WHOLE, limits.frames)
    kept = _kept_characters(sample, tokenizer, room.sequence_length - shown) if few else 0
    if kept == 0:
        return Fitted(sample.key, 0, tiles, limits.tiles, WHOLE, limits.frames)
    text = chat.text_length(shorten(sample.messages, kept), tokenizer)
    return Fitted(sample.key, text + shown, tiles, limits.tiles, kept, limits.frames)


def _kept_characters(sample: Sample, tokenizer: Tokenizer, budget: int) -> int:
    """Characters a sample's document may keep for its text to take `budget` tokens; 0 if none."""
    place = document_part(sample.messages)
    if place is None:
        return 0
    document = sample.messages[place[0]]["content"][place[1]]["text"]
    keep = len(tokenizer.encode(document))
    excess = chat.text_length(sample.messages, tokenizer) - budget
    while excess > 0 and keep > excess:
        keep -= excess
        kept = tokenizer.prefix(document, keep)
        excess = chat.text_length(shorten(sample.messages, kept), tokenizer) - budget
    return kept if excess <= 0 else 0
