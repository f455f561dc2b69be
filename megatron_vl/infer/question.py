"""What a model is asked: a conversation, its pictures, videos and document pages, its tools."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.data.chat import Tool, visual_parts
from megatron_vl.data.fit import media_header
from megatron_vl.data.loader import held_out_examples
from megatron_vl.data.tiling import decode_image
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.pdf import page_images

IMAGE, VIDEO, PDF = "image", "video", "pdf"


@dataclass(frozen=True)
class Question:
    """What is asked.

    Attributes:
        messages: conversation in the internal form, ending with the user's turn.
        images: encoded images and videos, in the order of their parts.
        reference: the known answer, if the question is a held-out sample.
        tools: functions the model may call.
        evs_rate: part of a video's embeddings that is pruned; None is the stage's own.
    """

    messages: list[dict[str, Any]]
    images: list[bytes]
    reference: str | None = None
    tools: tuple[Tool, ...] = ()
    evs_rate: float | None = None

    @property
    def prompt(self) -> str:
        """The text of the last user turn."""
        return text_of(self.messages[-1])


def text_of(message: dict[str, Any]) -> str:
    """The text parts of one message."""
    content = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part["type"] == "text")


def asked(
    prompt: str,
    shown: Sequence[tuple[str, str]] = (),
    *,
    system: str | None = None,
    pages: tuple[int, int] | None = None,
    tools: Sequence[Tool] = (),
    evs_rate: float | None = None,
) -> Question:
    """A question from the command line; what is shown stands before the prompt, in order.

    Args:
        shown: kind (image, video or pdf) and file of each; a PDF is shown page by page.
        pages: first and last page of a PDF, from 1; all where None.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file cannot be read as what it is said to be, or pages or a rate are given and
            nothing they are of.
    """
    kinds = {kind for kind, _ in shown}
    for value, kind, what in (
        (pages, PDF, "pages were"),
        (evs_rate, VIDEO, "a pruning rate was"),
    ):
        if value is not None and kind not in kinds:
            raise ValueError(f"{what} given without a {kind}; add --{kind} FILE")
    parts: list[dict[str, Any]] = []
    media: list[bytes] = []
    for kind, file in shown:
        data = Path(file).read_bytes()
        images = page_images(data, file, pages) if kind == PDF else [data]
        part_kind = IMAGE if kind == PDF else kind
        if kind != PDF:
            _check(kind, data, file)
        parts += [{"type": part_kind, part_kind: file} for _ in images]
        media += images
    parts.append({"type": "text", "text": prompt})
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    return Question(messages, media, tools=tuple(tools), evs_rate=evs_rate)


def _check(kind: str, data: bytes, file: str) -> None:
    """Raise ValueError, with the file's name, where it is no picture or video."""
    try:
        if kind == IMAGE:
            decode_image(data)
        else:
            media_header(kind, data)
    except Exception as error:
        nearest = "JPEG or PNG" if kind == IMAGE else "MP4 or WebM"
        if data.startswith(b"%PDF"):
            nearest = "--pdf for a document"
        what = "picture" if kind == IMAGE else "video"
        raise ValueError(
            f"{file} is not a {what} that can be read ({error}); use {nearest}"
        ) from error


def held_out(
    model: OpenModel, source: str, count: int, *, evs_rate: float | None = None
) -> list[Question]:
    """The first held-out samples of a source, up to their first answer.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: no such source.
    """
    return [
        question_of(messages, media, evs_rate=evs_rate)
        for messages, media in held_out_examples(model.config, source, count)
    ]


def question_of(
    messages: list[dict[str, Any]], media: Sequence[bytes], *, evs_rate: float | None = None
) -> Question:
    """A sample as a question: up to its first answer, which is the known one."""
    first = next(i for i, message in enumerate(messages) if message["role"] == "assistant")
    before = messages[:first]
    shown = list(media[: len(visual_parts(before))])
    return Question(before, shown, text_of(messages[first]), evs_rate=evs_rate)
