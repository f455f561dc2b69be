"""Samples and prompts with pictures: what is fitted is what is encoded, in every way of showing."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import FrameLabels, Tiling
from megatron_vl.data.encode import encode_prompt, encode_sample
from megatron_vl.data.fit import WHOLE, Room, fit_sample, headers_of
from megatron_vl.data.frames import VideoRules
from megatron_vl.data.headers import VideoHeader, image_header, video_header
from megatron_vl.data.loader import held_out_examples
from megatron_vl.data.pack import make_pack
from megatron_vl.data.store import Sample, SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.sequence.counts import evs_kept
from megatron_vl.sequence.grids import num_tiles
from megatron_vl.sequence.visual import ImageSpan, VideoSpan
from tests.data.gallery import saved
from tests.support.videos import encode_video, number_of, numbered_frames

ROOM = Room(sequence_length=4096, tile_size=64, patch_size=8, max_tiles=12, position_grid=64)


class OneSample:
    """A store of one sample."""

    def __init__(self, sample: Sample):
        self._sample = sample

    def sample(self, key: str) -> Sample:
        assert key == self._sample.key
        return self._sample


def picture(width: int, height: int, seed: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return saved(Image.fromarray(pixels), "PNG")


def conversation(
    media: Sequence[tuple[str, bytes]], *, document: str = "", stated: bool = True
) -> Sample:
    """A user turn of pictures, a document and a question; an answer."""
    files = {f"m{number}": data for number, (_, data) in enumerate(media)}
    content: list[dict[str, Any]] = []
    for (kind, data), name in zip(media, files, strict=True):
        header = image_header(data) if kind == "image" else video_header(data)
        part = {"type": kind, kind: name}
        content.append({**part, "metadata": header.metadata()} if stated else part)
    content += [{"type": "text", "text": document}, {"type": "text", "text": "\n\nWhat is it?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
    ]
    return Sample("key_7", "made", messages, files.__getitem__)


@pytest.fixture(scope="module")
def clip() -> bytes:
    """Twenty seconds of 60 numbered frames."""
    return encode_video(numbered_frames(60), rate=3, g="12")


def encoded(sample: Sample, tokenizer: Tokenizer, room: Room) -> tuple[Any, Any, Any]:
    fitted = fit_sample(sample, headers_of(sample), tokenizer, room)
    document, pixels = encode_sample(OneSample(sample), fitted, tokenizer, room)  # type: ignore[arg-type]
    assert len(document) == fitted.length <= room.sequence_length
    make_pack(
        [document], pixels, [sample.key], length=len(document), patch_size=8, pad_token=0
    )  # patches are those that the spans describe
    return fitted, document, pixels


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize("tiling", Tiling)
def test_images_in_every_tiling(tokenizer: Tokenizer, tiling: Tiling, stated: bool) -> None:
    sizes = [(200, 90), (64, 64), (300, 310)]
    sample = conversation([("image", picture(*size)) for size in sizes], stated=stated)
    room = replace(ROOM, tiling=tiling, min_patches=16, max_patches=768)
    fitted, document, pixels = encoded(sample, tokenizer, room)
    assert [type(span) for span in document.visuals] == [ImageSpan] * 3
    tiles = [num_tiles(*size, tile_size=64, max_tiles=12) for size in sizes]
    if tiling in (Tiling.native, Tiling.native_matched):
        assert [len(unit) for unit in pixels] == [1, 1, 1]
        ratios = [unit.shape[3] / unit.shape[2] for unit in pixels]
        assert ratios == pytest.approx([200 / 90, 1, 300 / 310], rel=0.12)
    else:
        area = tiling is Tiling.area_weighted
        tiles = [num_tiles(*s, tile_size=64, max_tiles=12, area_weighted=area) for s in sizes]
        assert [tuple(unit.shape) for unit in pixels] == [(n, 3, 64, 64) for n in tiles]
        assert fitted.tiles == sum(tiles)
    if tiling is Tiling.native:
        edges = [(96, 192), (64, 64), (224, 208)]
        assert [tuple(unit.shape) for unit in pixels] == [(1, 3, *edge) for edge in edges]
        assert fitted.tiles == -(-(12 * 24 + 8 * 8 + 28 * 26) // 64)
    if tiling is Tiling.native_matched:
        spent = [span.tokens for span in document.visuals]
        assert all(0.95 * 16 * n <= t <= 16 * n for t, n in zip(spent, tiles, strict=True))


@pytest.mark.parametrize("labels", FrameLabels)
@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_videos(tokenizer: Tokenizer, clip: bytes, labels: FrameLabels, rate: float) -> None:
    rules = VideoRules(max_frames=12, labels=labels, evs_rate=(rate,))
    sample = conversation([("video", clip), ("image", picture(64, 64))])
    fitted, document, pixels = encoded(sample, tokenizer, replace(ROOM, video=rules))
    video, image = document.visuals
    assert isinstance(video, VideoSpan)
    assert isinstance(image, ImageSpan)
    assert (video.num_frames, video.kept) == (12, evs_kept(12, 16, rate))
    assert video.pruned is (rate > 0)
    assert (fitted.tiles, fitted.max_frames) == (13, 12)
    text = tokenizer.decode(document.tokens_N.tolist())
    separator = "\n" if labels is FrameLabels.newline else ""
    assert f"</img>{separator}Frame 12 sampled at 18.98 seconds: <img>" in text
    assert text.count("<image>") == video.kept + image.tokens
    assert [tuple(units.shape) for units in pixels] == [(12, 3, 64, 64), (1, 3, 64, 64)]
    shown = np.repeat(pixels[0].numpy().transpose(0, 2, 3, 1), 3, axis=2)[:, :, ::2]
    assert [number_of(frame) for frame in shown] == [2 + 5 * at for at in range(12)]


def test_the_rate_of_a_range_is_the_samples_own(tokenizer: Tokenizer, clip: bytes) -> None:
    rules = VideoRules(max_frames=12, evs_rate=(0.1, 0.8), seed=3)
    kept = set()
    for key in ("a", "b", "c", "d"):
        sample = replace(conversation([("video", clip), ("video", clip)]), key=key)
        _, document, _ = encoded(sample, tokenizer, replace(ROOM, video=rules))
        one, two = document.visuals
        assert one.kept == two.kept == evs_kept(12, 16, rules.rate("made", key))
        kept.add(one.kept)
    assert len(kept) > 1


def test_long_samples_lose_tiles_then_frames_then_text(tokenizer: Tokenizer, clip: bytes) -> None:
    sample = conversation([("image", picture(384, 128)), ("video", clip)], document="word " * 300)
    rules = VideoRules(min_frames=4, max_frames=32)
    steps: list[tuple[bool, int, int]] = []
    for length in range(2400, 200, -30):
        room = replace(ROOM, sequence_length=length, video=rules)
        fitted = fit_sample(sample, headers_of(sample), tokenizer, room)
        assert fitted.length <= length
        step = (fitted.kept_characters != WHOLE, -fitted.max_tiles, -fitted.max_frames)
        if fitted.length and step not in steps:
            encoded(sample, tokenizer, room)
            steps.append(step)
    assert steps == sorted(steps), "tiles go first, then frames, then text"
    assert {(False, -12, -32), (False, -8, -32), (False, -1, -32)} < set(steps)
    assert [step for step in steps if step[1] == -1][1:] == [
        (False, -1, -16), (False, -1, -8), (False, -1, -4), (True, -1, -4)
    ]  # fmt: skip


def test_what_cannot_fit_has_length_0(tokenizer: Tokenizer, clip: bytes) -> None:
    room = replace(ROOM, sequence_length=120)
    sample = conversation([("video", clip)])
    assert fit_sample(sample, headers_of(sample), tokenizer, room).length == 0


def test_headers_come_from_the_row_or_else_from_the_file(clip: bytes) -> None:
    media = [("image", picture(30, 20)), ("video", clip)]
    told, asked = conversation(media), conversation(media, stated=False)
    expected = [(30, 20), video_header(clip)]
    assert headers_of(asked) == expected
    assert headers_of(replace(told, read_media={}.__getitem__)) == expected


def test_pictures_that_are_not_what_their_row_says(tokenizer: Tokenizer, clip: bytes) -> None:
    sample = conversation([("image", picture(100, 50))])
    sample.messages[0]["content"][0]["metadata"] = {"width": 101, "height": 50}
    with pytest.raises(ValueError, match="100x50 pixels, its metadata says 101x50"):
        encoded(sample, tokenizer, ROOM)
    sample = conversation([("video", clip)])
    header = video_header(clip)
    longer = VideoHeader(header.width, header.height, header.fps, 90, 30.0)
    sample.messages[0]["content"][0]["metadata"] = longer.metadata()
    with pytest.raises(ValueError, match=r"ends after 20\.00 seconds"):
        encoded(sample, tokenizer, ROOM)
    cut = conversation([("image", picture(100, 50))])
    fitted = fit_sample(cut, headers_of(cut), tokenizer, ROOM)
    broken = replace(cut, read_media=lambda name: picture(100, 50)[:200])
    with pytest.raises(ValueError, match="cannot decode the image"):
        encode_sample(OneSample(broken), fitted, tokenizer, ROOM)  # type: ignore[arg-type]


def test_a_table_that_is_out_of_date_is_noticed(tokenizer: Tokenizer) -> None:
    sample = conversation([("image", picture(100, 50))])
    fitted = fit_sample(sample, headers_of(sample), tokenizer, ROOM)
    stale = replace(fitted, length=fitted.length + 1)
    with pytest.raises(ValueError, match="the length table says"):
        encode_sample(OneSample(sample), stale, tokenizer, ROOM)  # type: ignore[arg-type]


def test_prepared_clips_are_encoded_as_they_are_fitted(
    stage: StageConfig, tokenizer: Tokenizer
) -> None:
    video = replace(stage.data.video, max_frames=16, evs_rate=[0.0, 0.7])
    config = replace(stage, data=replace(stage.data, sequence_length=1024, video=video))
    room, store = Room.of(config), SourceStore(stage.data.root, "clips", "train")
    rates = set()
    for key in store.keys:
        sample = store.sample(key)
        fitted = fit_sample(sample, headers_of(sample), tokenizer, room)
        document, (frames,) = encode_sample(store, fitted, tokenizer, room)
        (span,) = document.visuals
        assert isinstance(span, VideoSpan)
        assert len(frames) == span.num_frames == fitted.tiles >= 8
        assert len(document) == fitted.length
        rates.add(span.kept / span.num_frames)
    assert len(rates) > 6
    store.close()


def test_prompts_with_images(stage: StageConfig, tokenizer: Tokenizer) -> None:
    (messages, media), *_ = held_out_examples(stage, "captions", 3)
    prompt = encode_prompt(stage, messages[:1], media, reasoning=False)
    tokens = prompt.tokens_L
    assert tokenizer.decode(tokens.tolist()).endswith("Assistant\n<think></think>")
    visual = prompt.visual_rows_L >= 0
    assert int(visual.sum()) == 16 * len(prompt.grids) > 0
    assert (tokens[visual] == tokenizer.image_id).all()
    assert prompt.patches_PF.shape == (64 * len(prompt.grids), 192)
    assert prompt.num_tokens == len(tokens)


def test_prompts_with_text_alone_and_with_videos(stage: StageConfig, tokenizer: Tokenizer) -> None:
    text = [{"role": "user", "content": "Hello"}]
    prompt = encode_prompt(stage, text, [], reasoning=True)
    assert tokenizer.decode(prompt.tokens_L.tolist()).endswith("Assistant\n<think>\n")
    assert prompt.patches_PF.shape == (0, 192)
    (messages, media), *_ = held_out_examples(stage, "clips", 1)
    video = replace(stage.data.video, evs_rate=[0.5, 0.7])
    pruned = replace(stage, data=replace(stage.data, video=video))
    prompt = encode_prompt(pruned, messages[:1], media, reasoning=True)
    (placed,) = prompt.videos
    assert placed.span.kept == evs_kept(len(prompt.grids), 16, 0.5)
    with pytest.raises(ValueError, match="shows 0 images and videos, 1 were given"):
        encode_prompt(stage, text, media, reasoning=True)
