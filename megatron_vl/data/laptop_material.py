"""The laptop recipe's samples with pictures, built from real material in installed packages.

Views of photographs, rendered text, handwritten digits and clips, each with a question whose answer
is computed from the material. The questions stand apart from the pictures, because the same ones
are asked about pictures told in words (`laptop_described.py`).
"""

from dataclasses import dataclass, field
from random import Random
from typing import Any

from megatron_vl.data import laptop_clips, pictures
from megatron_vl.data.documents import identifiers, paragraphs, words


@dataclass(frozen=True)
class RawSample:
    """A conversation in v2 form and its encoded images and videos.

    messages: image and video parts stand in the order of media and carry no name yet.
    media: file extension and bytes of each.
    """

    messages: list[dict[str, Any]]
    media: list[tuple[str, bytes]] = field(default_factory=list)


Asked = tuple[str, str]
"""A question and its answer."""


def _about(medium: tuple[str, bytes], question: str, answer: str, kind: str = "image") -> RawSample:
    """One question on one image or video."""
    user = {"role": "user", "content": [{"type": kind}, {"type": "text", "text": question}]}
    assistant = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return RawSample([user, assistant], [medium])


def _photo(view: pictures.View) -> tuple[str, bytes]:
    return "jpg", pictures.encode_jpeg(view.image)


def caption_of(random: Random, view: pictures.View) -> Asked:
    """A request for a caption of a view, and the caption."""
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
    return question, answer


def captions(random: Random, split: str, tile_size: int) -> RawSample:
    """A view of a photograph with a caption."""
    view = pictures.draw_view(random, split, tile_size)
    return _about(_photo(view), *caption_of(random, view))


def ocr_lines(random: Random, split: str) -> list[str]:
    """Text for an image: a word, an identifier, or one to three short lines of prose."""
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


def reading_request(random: Random) -> str:
    """A request to read what an image says."""
    return random.choice(("Read the text.", "What does the image say?", "Transcribe the image."))


def ocr(random: Random, split: str, tile_size: int) -> RawSample:
    """An image of text and the text."""
    question = reading_request(random)
    if random.random() < 0.05:
        text, image = pictures.scanned_line(random, split)
        return _about(("png", pictures.encode_png(image)), question, text)
    lines = ocr_lines(random, split)
    image = pictures.render_lines(random, lines, tile_size)
    return _about(("png", pictures.encode_png(image)), question, "\n".join(lines))


def photo_question(random: Random, view: pictures.View) -> Asked:
    """A short question on a view, and its answer."""
    return random.choice(
        (
            ("What is shown?", view.photograph.name),
            ("What is in this picture? Answer briefly.", view.photograph.name),
            ("What is the main colour?", view.colours[0]),
            ("Is the image dark, mid-tone or bright?", view.brightness),
        )
    )


def two_or_three_words(random: Random, split: str) -> list[str]:
    """Words for one line of an image."""
    return random.sample(words(split), random.randint(2, 3))


def word_question(random: Random, chosen: list[str]) -> Asked:
    """A question on the words of a line, and its answer."""
    return random.choice(
        (
            ("What is the first word?", chosen[0]),
            ("What is the second word?", chosen[1]),
            ("What is the last word?", chosen[-1]),
            ("How many words are there?", str(len(chosen))),
        )
    )


def digit_question(random: Random, found: list[int]) -> Asked:
    """A question on handwritten digits in a row, and its answer."""
    if len(found) == 1:
        return "Which digit?", str(found[0])
    if random.random() < 0.7:
        return "Which digits, from left to right?", " ".join(map(str, found))
    listed = " + ".join(map(str, found))
    trace = f"<think>\nI see {listed} = {sum(found)}.\n</think>\n\n{sum(found)}"
    return "What is the sum of the digits?", trace


DIGIT_COUNTS = (1, 1, 1, 2, 3)
"""How many digits stand in a row, each as likely as the others."""


def _photo_sample(random: Random, split: str, tile_size: int) -> RawSample:
    view = pictures.draw_view(random, split, tile_size)
    return _about(_photo(view), *photo_question(random, view))


def _word_sample(random: Random, split: str, tile_size: int) -> RawSample:
    chosen = two_or_three_words(random, split)
    image = pictures.render_lines(random, [" ".join(chosen)], tile_size)
    return _about(("png", pictures.encode_png(image)), *word_question(random, chosen))


def _digit_sample(random: Random, split: str, tile_size: int) -> RawSample:
    found, image = pictures.digit_row(random, split, random.choice(DIGIT_COUNTS), tile_size)
    return _about(("png", pictures.encode_png(image)), *digit_question(random, found))


def qa(random: Random, split: str, tile_size: int) -> RawSample:
    """A question on an image with a short answer."""
    make = random.choices((_photo_sample, _word_sample, _digit_sample), (40, 25, 35))[0]
    return make(random, split, tile_size)


def clips(random: Random, split: str, tile_size: int) -> RawSample:
    """A short video and a question that its frames answer, most only in their order."""
    clip = laptop_clips.draw_clip(random, split, tile_size)
    return _about(("mp4", clip.data), clip.question, clip.answer, "video")
