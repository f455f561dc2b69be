"""Conversations through the shipped tokenizer, template and processors, beside the training code.

Half of them, where the stage's data is at hand, are its held-out samples up to their first answer;
the rest is made here: text of any script, pictures of shapes that cut into other grids, several at
once, clips, reasoning on and off. Both sides must give the same ids, and the same pixels to within
float rounding.
"""

import io
import random
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from PIL import Image
from torch import Tensor

from checkpoint_tools.certificate.check import Findings, listing
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.chat import visual_parts
from megatron_vl.data.encode import encode_prompt
from megatron_vl.data.fit import Room, media_header
from megatron_vl.data.headers import VideoHeader
from megatron_vl.data.loader import held_out_examples
from megatron_vl.data.pack import Pack
from megatron_vl.data.video import read_frames
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD

KINDS = ("text", "image", "images", "video")
_TEXTS = (
    "What is shown here, and where?",
    "  Read the sign,\n\nthen count: 1, 2, 3...  ",
    "Wie heißt das? Qu'est-ce que c'est ? これは何ですか 🙂",
    "def f(x):\n\treturn {'a': x ** 2}  # <b>&amp;</b>",
    "Answer briefly. /no_think",
    "Think it over first. /think",
    "A line with <angle> and <image-like> words",
)
# Words that spell a control token are left out: to a Hugging Face tokenizer they are that token,
# training never lets text become one.
_SIZES = ((64, 64), (150, 37), (33, 170), (9, 7), (320, 200), (200, 321))
"""Width and height of made pictures. [pixels]"""
_CLIPS = ((12, 6), (40, 30))
"""Frames and frames a second of made clips."""


@dataclass(frozen=True)
class Prompt:
    """A conversation that ends with the user's turn.

    Attributes:
        kind: of `KINDS`.
        media: encoded images and videos in the order of their parts.
        origin: `held-out SOURCE` or `made`.
    """

    kind: str
    messages: list[dict[str, Any]]
    media: list[bytes]
    reasoning: bool
    origin: str


def without_pruning(config: StageConfig) -> StageConfig:
    """The stage as its release serves it: every embedding of a video stays."""
    served = deepcopy(config)
    served.data.video.evs_rate = [0.0]
    return served


def make_prompts(config: StageConfig, count: int) -> list[Prompt]:
    """Up to half held-out samples of the blend's sources, made ones for the rest; always the same.

    The first of each kind in `KINDS` is there whatever the blend.
    """
    held_out = list(_held_out(config, count // 2))
    made = _made(count - len(held_out))
    return [*made, *held_out]


def _held_out(config: StageConfig, count: int) -> Iterator[Prompt]:
    sources = _sources(config)
    for at, source in enumerate(sources):
        share = count // len(sources) + (at < count % len(sources))
        try:
            examples = held_out_examples(config, source, share)
        except (OSError, ValueError):
            continue  # an imported checkpoint has no data; made prompts take their place
        for number, (messages, media) in enumerate(examples):
            roles = [message["role"] for message in messages]
            asked = messages[: roles.index("assistant")] if "assistant" in roles else messages
            shown = visual_parts(asked)
            yield Prompt(
                _kind([part["type"] for part in shown]),
                asked,
                media[: len(shown)],
                number % 2 == 1,
                f"held-out {source}",
            )


def _sources(config: StageConfig) -> list[str]:
    """The blend's sources, and what else lies beside them: a stage of text alone has no picture."""
    root = Path(config.data.root)
    beside = {path.parent.name for path in root.glob("*/.nv-meta")}
    return sorted({*config.data.blend, *beside})


def _kind(shown: Sequence[str]) -> str:
    if "video" in shown:
        return "video"
    return "text" if not shown else "image" if len(shown) == 1 else "images"


def _made(count: int) -> list[Prompt]:
    draw = random.Random(20)
    prompts = []
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        reasoning = number // len(KINDS) % 2 == 1
        text = _TEXTS[number // len(KINDS) % len(_TEXTS)]
        media = _media(kind, number // len(KINDS), draw)
        part = "video" if kind == "video" else "image"
        content: list[dict[str, Any]] = [{"type": part, part: f"{n}"} for n in range(len(media))]
        content.insert(number % 2 * len(content), {"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": content if media else text}]
        if number % 3 == 2:
            messages.insert(0, {"role": "system", "content": "Be exact."})
        if number % 5 == 4:
            before = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]
            messages[-1:-1] = before
        prompts.append(Prompt(kind, messages, media, reasoning, "made"))
    return prompts


def _media(kind: str, number: int, draw: random.Random) -> list[bytes]:
    if kind == "text":
        return []
    if kind == "video":
        return [clip_bytes(*_CLIPS[number % len(_CLIPS)], seed=number)]
    several = 1 if kind == "image" else 2 + number % 2
    return [picture_bytes(*draw.choice(_SIZES), seed=10 * number + n) for n in range(several)]


def picture_bytes(width: int, height: int, seed: int) -> bytes:
    """A PNG of coarse noise, in which edges of all directions occur."""
    noise = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize((width, height), Image.Resampling.NEAREST).save(file, "PNG")
    return file.getvalue()


def clip_bytes(frames: int, rate: int, seed: int) -> bytes:
    """An MP4 clip of a bar that moves over coarse noise."""
    file = io.BytesIO()
    ground = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    ground = np.kron(ground, np.ones((16, 16, 1), dtype=np.uint8))
    with av.open(file, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=rate, options={"flags": "+bitexact"})
        video.width, video.height, video.pix_fmt = 128, 96, "yuv420p"
        for at in range(frames):
            picture = ground.copy()
            picture[:, at * 120 // frames : at * 120 // frames + 8] = 255
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(video.encode())
    return file.getvalue()


def ours(config: StageConfig, prompt: Prompt) -> Pack:
    """The prompt as the training code encodes it; `config` without pruning."""
    return encode_prompt(config, prompt.messages, prompt.media, prompt.reasoning)


def theirs(processor: Any, config: StageConfig, prompt: Prompt) -> dict[str, Tensor]:
    """The prompt as a reader of the model card asks it: model inputs."""
    text = processor.apply_chat_template(
        prompt.messages, add_generation_prompt=True, enable_thinking=prompt.reasoning
    )
    images: list[Any] = []
    videos: list[list[Any]] = []
    numbers: list[Sequence[int]] = []
    rates: list[float] = []
    room = Room.of(config)
    for part, data in zip(visual_parts(prompt.messages), prompt.media, strict=True):
        header = media_header(part["type"], data)
        if isinstance(header, VideoHeader):
            (clip,) = room.visuals([header], room.limits, 0.0)
            numbers.append(clip.frames)  # type: ignore[union-attr]
            videos.append(list(read_frames(data, numbers[-1], header)))
            rates.append(header.fps)
        else:
            images.append(Image.open(io.BytesIO(data)))
    if len(set(rates)) > 1:
        raise ValueError("the processor takes one frame rate for all videos of a call")
    given = processor(
        images=images or None,
        videos=videos or None,
        frame_numbers=numbers or None,
        fps=rates[0] if rates else 2.0,
        text=text,
        return_tensors="pt",
    )
    return dict(given)


def normalised_tiles(pack: Pack, patch: int, tile: int) -> Tensor:
    """The pixels of a pack's tiles as the training model normalises them, (T, 3, S, S) float32."""
    edge = tile // patch
    grid = pack.patches_PF.unflatten(1, (3, patch, patch)).unflatten(0, (-1, edge, edge))
    tiles_TCSS = grid.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (PIXEL_MEAN, PIXEL_STD))
    return (tiles_TCSS.float() - 255 * mean) / (255 * std)


def check_prompts(
    processor: Any, config: StageConfig, prompts: Sequence[Prompt], bound: float, findings: Findings
) -> bool:
    """Ids and pixels of every prompt, both ways.

    Args:
        bound: largest difference of a normalised pixel.
    """
    served = without_pruning(config)
    other_ids, other_pixels, worst, shown = [], [], 0.0, 0
    for number, prompt in enumerate(prompts):
        name = f"prompt {number} ({prompt.kind}, {prompt.origin})"
        pack, given = ours(served, prompt), theirs(processor, served, prompt)
        found, expected = given["input_ids"][0].tolist(), pack.tokens_L.tolist()
        if found != expected:
            other_ids.append(f"{name}: {_first_difference(found, expected)}")
        if not prompt.media:
            continue
        shown += 1
        tiles = normalised_tiles(pack, config.model.encoder.patch_size, config.data.tile_size)
        pixels = given["pixel_values"]
        if pixels.shape != tiles.shape:
            other_pixels.append(f"{name}: {list(pixels.shape)}, expected {list(tiles.shape)}")
            continue
        gap = float((pixels - tiles).abs().max())
        worst = max(worst, gap)
        if not gap <= bound:
            other_pixels.append(f"{name}: a pixel differs by {gap:.3g}")
    counts = {kind: sum(prompt.kind == kind for prompt in prompts) for kind in KINDS}
    counts["held_out"] = sum(prompt.origin != "made" for prompt in prompts)
    findings.figures["prompts"] = counts
    passed = findings.none_of("prompt_ids", other_ids, len(prompts), "prompts")
    return passed & findings.add(
        "prompt_pixels",
        not other_pixels,
        worst,
        bound,
        listing(other_pixels) or ("" if shown else "no prompt shows a picture"),
    )


def _first_difference(found: Sequence[int], expected: Sequence[int]) -> str:
    for at, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return f"id {at} is {one}, expected {other}"
    return f"{len(found)} ids, expected {len(expected)}"
