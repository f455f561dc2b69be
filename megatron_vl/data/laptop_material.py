"""The laptop recipe's seven data sources, built from real material in installed packages.

    captions   views of photographs, described by what they show and what their pixels say
    ocr        words, lines and short paragraphs of documentation in real fonts; a scanned page
    qa         short questions on photographs, rendered text and handwritten digits
    code       functions of the standard library: written from a docstring, completed, explained
    text       documentation, instructions, small problems solved with and without a reasoning trace
    long_text  whole documents, then questions about their first part, far away

Every answer is computed from the material. A source yields the same samples for the same seed,
split, count and Python installation; held-out samples come from other modules, topics, image
parts, seconds of video and digits.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from random import Random
from typing import Any

from megatron_vl.data import laptop_clips, laptop_text, pictures
from megatron_vl.data.documents import identifiers, paragraphs, words


@dataclass(frozen=True)
class RawSample:
    """A conversation in v2 form and its encoded images and videos.

    messages: image and video parts stand in the order of media and carry no name yet.
    media: file extension and bytes of each.
    """

    messages: list[dict[str, Any]]
    media: list[tuple[str, bytes]] = field(default_factory=list)


def _about(medium: tuple[str, bytes], question: str, answer: str, kind: str = "image") -> RawSample:
    """One question on one image or video."""
    user = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return RawSample([user, assistant], [medium])


def _photo(view: pictures.View) -> tuple[str, bytes]:
    return "jpg", pictures.encode_jpeg(view.image)


def captions(random: Random, split: str, tile_size: int) -> RawSample:
    """A view of a photograph with a caption."""
    view = pictures.draw_view(random, split, tile_size)
    colours = " and ".join(view.colours)
    answer = random.choice(
        (
            f"This is {view.photograph.subject}. Most of the view is {view.colours[0]}.",
            f"A {view.brightness} view of {view.photograph.subject}, mostly {colours}.",
            f"The {view.part} part of a picture of {view.photograph.subject}.",
            f"The picture shows {view.photograph.subject}. It is {view.brightness} and {colours}.",
        )
    )
    question = random.choice(
        ("Describe the image.", "What does the picture show?", "Write a caption.")
    )
    return _about(_photo(view), question, answer)


def _ocr_lines(random: Random, split: str) -> list[str]:
    kind = random.random()
    if kind < 0.45:
        return [random.choice(words(split))]
    if kind < 0.6:
        return [random.choice(identifiers(split))]
    text = random.choice(paragraphs(split)).split()
    start = random.randrange(max(1, len(text) - 4))
    lines, wanted = [""], 1 if kind < 0.85 else random.randint(2, 3)
    for word in text[start:]:
        if len(lines[-1]) + len(word) > 15:
            if len(lines) == wanted:
                break
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return [line for line in lines if line] or [random.choice(words(split))]


def ocr(random: Random, split: str, tile_size: int) -> RawSample:
    """An image of text and the text."""
    question = random.choice(
        ("Read the text.", "What does the image say?", "Transcribe the image.")
    )
    if random.random() < 0.05:
        text, image = pictures.scanned_line(random, split)
        return _about(("png", pictures.encode_png(image)), question, text)
    lines = _ocr_lines(random, split)
    image = pictures.render_lines(random, lines, tile_size)
    return _about(("png", pictures.encode_png(image)), question, "\n".join(lines))


def _photo_question(random: Random, split: str, tile_size: int) -> RawSample:
    view = pictures.draw_view(random, split, tile_size)
    question, answer = random.choice(
        (
            ("What is shown?", view.photograph.name),
            ("What is in this picture? Answer briefly.", view.photograph.name),
            ("What is the main colour?", view.colours[0]),
            ("Is the image dark, mid-tone or bright?", view.brightness),
        )
    )
    return _about(_photo(view), question, answer)


def _text_question(random: Random, split: str, tile_size: int) -> RawSample:
    chosen = random.sample(words(split), random.randint(2, 3))
    image = pictures.render_lines(random, [" ".join(chosen)], tile_size)
    question, answer = random.choice(
        (
            ("What is the first word?", chosen[0]),
            ("What is the second word?", chosen[1]),
            ("What is the last word?", chosen[-1]),
            ("How many words are there?", str(len(chosen))),
        )
    )
    return _about(("png", pictures.encode_png(image)), question, answer)


def _digit_question(random: Random, split: str, tile_size: int) -> RawSample:
    count = random.choice((1, 1, 1, 2, 3))
    found, image = pictures.digit_row(random, split, count, tile_size)
    encoded = ("png", pictures.encode_png(image))
    if count == 1:
        return _about(encoded, "Which digit?", str(found[0]))
    if random.random() < 0.7:
        return _about(encoded, "Which digits, from left to right?", " ".join(map(str, found)))
    listed = " + ".join(map(str, found))
    trace = f"<think>\nI see {listed} = {sum(found)}.\n</think>\n\n{sum(found)}"
    return _about(encoded, "What is the sum of the digits?", trace)


def qa(random: Random, split: str, tile_size: int) -> RawSample:
    """A question on an image with a short answer."""
    make = random.choices((_photo_question, _text_question, _digit_question), (40, 25, 35))[0]
    return make(random, split, tile_size)


def clips(random: Random, split: str, tile_size: int) -> RawSample:
    """A short video and a question that its frames answer, most only in their order."""
    clip = laptop_clips.draw_clip(random, split, tile_size)
    return _about(("mp4", clip.data), clip.question, clip.answer, "video")


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
    "clips": Source(clips, 450),
    "code": Source(_text_only(laptop_text.code), 2500),
    "text": Source(_text_only(laptop_text.text), 2500),
    "long_text": Source(_text_only(laptop_text.long_text), 150),
}

DEFAULT_SIZES = {name: source.train_count for name, source in SOURCES.items()}
"""Training samples of each source. [samples]"""


def held_out_count(train_count: int) -> int:
    """Held-out samples that go with a number of training samples."""
    return max(8, train_count // 15)


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
