"""One conversation to what the model reads: its document and the pixels of its visual units."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data import chat
from megatron_vl.data.chat import Visual
from megatron_vl.data.fit import Fitted, Header, Room, headers_of, media_header, shorten
from megatron_vl.data.frames import Clip
from megatron_vl.data.headers import VideoHeader
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.store import Sample, SourceStore, missing_root
from megatron_vl.data.tiling import cut_tiles, decode_image, whole_picture
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.data.video import tile_video
from megatron_vl.sequence.layout import Document


def load_tokenizer(config: StageConfig) -> Tokenizer:
    """The tokenizer beside a stage's data.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: its size is not the model's.
    """
    root = Path(config.data.root)
    if not root.is_dir():
        raise missing_root(root)
    tokenizer = Tokenizer.load(root / TOKENIZER_FILE)
    if tokenizer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"{root / TOKENIZER_FILE} has {tokenizer.vocab_size} entries, model.vocab_size is "
            f"{config.model.vocab_size}; set model.vocab_size={tokenizer.vocab_size} or "
            "prepare the data again"
        )
    return tokenizer


def encode_sample(
    store: SourceStore, fitted: Fitted, tokenizer: Tokenizer, room: Room
) -> tuple[Document, list[Tensor]]:
    """`encode_fitted` of a stored sample."""
    return encode_fitted(store.sample(fitted.key), fitted, tokenizer, room)


def encode_fitted(
    sample: Sample, fitted: Fitted, tokenizer: Tokenizer, room: Room
) -> tuple[Document, list[Tensor]]:
    """A sample as it was fitted: its document, and the pixels of each of its pictures.

    Returns:
        The document, and for each image or video, in order, uint8 (units, 3, height, width).

    Raises:
        ValueError: a picture cannot be decoded or is not what its header said, or the length is not
            what the table said.
    """
    headers = headers_of(sample)
    visuals = room.visuals(headers, fitted.limits, room.video.rate(sample.source, sample.key))
    document = chat.encode_conversation(
        shorten(sample.messages, fitted.kept_characters), tokenizer, visuals
    )
    if len(document) != fitted.length:
        raise ValueError(
            f"it has {len(document)} tokens, the length table says {fitted.length}: the data has "
            "changed since; prepare it again"
        )
    shown = zip(sample.media(), headers, visuals, strict=True)
    return document, [
        _pixels(data, header, visual, fitted.max_tiles, room) for data, header, visual in shown
    ]


def _pixels(data: bytes, header: Header, visual: Visual, max_tiles: int, room: Room) -> Tensor:
    """The units of one image or video, uint8 (units, 3, height, width)."""
    if isinstance(visual, Clip):
        assert isinstance(header, VideoHeader)
        return tile_video(data, visual.frames, header, tile_size=room.tile_size)
    assert not isinstance(header, VideoHeader)
    pixels_HWC = decode_image(data)
    height, width = pixels_HWC.shape[:2]
    if (width, height) != header:
        raise ValueError(
            f"an image has {width}x{height} pixels, its metadata says {header[0]}x{header[1]}"
        )
    if room.in_tiles:
        return cut_tiles(pixels_HWC, room.tile_grid(header, max_tiles), room.tile_size)
    (grid,) = visual
    return whole_picture(pixels_HWC, grid.columns * room.patch_size, grid.rows * room.patch_size)


def encode_prompt(
    config: StageConfig,
    messages: Sequence[dict[str, Any]],
    media: Sequence[bytes],
    reasoning: bool,
    *,
    evs_rate: float | None = None,
    tools: Sequence[chat.Tool] = (),
    tokenizer: Tokenizer | None = None,
) -> Pack:
    """A conversation up to and with the opening of the answer to generate.

    Args:
        messages: v2 form; image and video parts take the media in order.
        media: encoded images and videos.
        reasoning: whether the answer starts with a trace, unless a message says /think or
            /no_think.
        evs_rate: part of a video's embeddings that is pruned; the lowest the stage trains with
            where None.
        tools: functions the model may call.
        tokenizer: the one beside the stage's data where None.

    Returns:
        The conversation as a pack of one document without padding.

    Raises:
        ValueError: parts and media differ in number, a medium cannot be read, or a tool has no
            name.
    """
    tokenizer, room = tokenizer or load_tokenizer(config), Room.of(config)
    parts = chat.visual_parts(messages)
    if len(parts) != len(media):
        raise ValueError(
            f"the conversation shows {len(parts)} images and videos, {len(media)} were given"
        )
    headers = [media_header(part["type"], data) for part, data in zip(parts, media, strict=True)]
    rate = room.video.evs_rate[0] if evs_rate is None else evs_rate
    visuals = room.visuals(headers, room.limits, rate)
    document = chat.encode_conversation(
        messages, tokenizer, visuals, add_generation_prompt=True, reasoning=reasoning, tools=tools
    )
    shown = zip(media, headers, visuals, strict=True)
    return make_pack(
        [document],
        [_pixels(data, header, visual, room.max_tiles, room) for data, header, visual in shown],
        ["prompt"],
        length=len(document),
        patch_size=room.patch_size,
        pad_token=tokenizer.pad_id,
    )
