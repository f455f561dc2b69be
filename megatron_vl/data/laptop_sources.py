"""The laptop recipe's data sources: which builder makes each, and how many samples of it.

    captions   views of photographs, described by what they show and what their pixels say
    ocr        words, lines and short paragraphs of documentation in real fonts; a scanned page
    qa         short questions on photographs, rendered text and handwritten digits
    clips      short videos with questions that mostly need the frames in their order
    code       functions of the standard library: written from a docstring, completed, explained
    text       documentation, instructions, small problems solved with and without a reasoning trace
    long_text  whole documents, then questions about their first part, far away
    described  what pictures show, told in words: read by the released decoder alone

Every answer is computed from the material. A source yields the same samples for the same seed,
split, count and Python installation; held-out samples come from other modules, topics, image
parts, seconds of video and digits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from megatron_vl.data import laptop_text
from megatron_vl.data.laptop_described import described
from megatron_vl.data.laptop_material import RawSample, captions, clips, ocr, qa


def _text_only(
    build: Callable[[Random, str], list[dict[str, Any]]],
) -> Callable[[Random, str, int], RawSample]:
    return lambda random, split, tile_size: RawSample(build(random, split))


@dataclass(frozen=True)
class Source:
    """How one source is built and how many training samples it has by default."""

    build: Callable[[Random, str, int], RawSample]
    train_count: int


SOURCES: dict[str, Source] = {
    "captions": Source(captions, 1500),
    "ocr": Source(ocr, 2000),
    "qa": Source(qa, 1500),
    "clips": Source(clips, 600),
    "code": Source(_text_only(laptop_text.code), 2500),
    "text": Source(_text_only(laptop_text.text), 2500),
    "long_text": Source(_text_only(laptop_text.long_text), 150),
    "described": Source(described, 4000),
}

DEFAULT_SIZES = {name: source.train_count for name, source in SOURCES.items()}
"""Training samples of each source. [samples]"""


def held_out_count(train_count: int) -> int:
    """Held-out samples that go with a number of training samples."""
    return max(8, train_count // 10)


def source_samples(
    source: str, *, split: str, count: int, seed: int, tile_size: int
) -> Iterator[RawSample]:
    """`count` samples of a source, distinct where the material allows it.

    Raises:
        ValueError: an unknown source or split.
    """
    if source not in SOURCES:
        raise ValueError(f"unknown source {source!r}; the laptop has {', '.join(SOURCES)}")
    if split not in ("train", "val"):
        raise ValueError(f"unknown split {split!r}; there are train and val")
    random = Random(f"{seed}/{source}/{split}")
    seen: set[str] = set()
    for _ in range(count):
        for _ in range(8):
            sample = SOURCES[source].build(random, split, tile_size)
            identity = repr(sample)
            if identity not in seen:
                break
        seen.add(identity)
        yield sample
