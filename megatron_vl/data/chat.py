"""Conversations to tokens, with what is trained on.

`encode_conversation` builds the token row of a conversation directly; `chat_template.jinja` beside
this file says the same as text, for servers and Hugging Face folders. A test holds the two
together.

The rules:
- turns are `<SPECIAL_10>System\\n...\\n`, `<SPECIAL_11>User\\n...\\n` and
  `<SPECIAL_11>Assistant\\n...\\n<SPECIAL_12>\\n`; a system turn is always there, empty if none is
  given;
- `/think` and `/no_think` in a system or user turn choose the reasoning mode, the last one wins,
  and both are removed from the text;
- an assistant turn opens with what a generation prompt opens with: `<think>\\n` where a trace
  follows, `<think></think>` where none does. Only the last turn of a conversation keeps its trace;
- trained on is what the model itself has to write: the assistant's text after that opening, up to
  and with `<SPECIAL_12>`. Opening and text are tokenised apart, as they are in generation.

Messages are those of the Nemotron VLM dataset v2: `{"role", "content"}`, content a string or a list
of parts `{"type": "text", "text"}`, `{"type": "image", ...}` and `{"type": "video", ...}`. Unknown
roles and part types are refused. Functions to call stand at the end of the system turn; a message
of the role "tool" is a result, and results that follow each other share a user turn (`tools.py`).

An image stands as `<img>`, one `<image>` for each embedding, `</img>`. A video stands frame by
frame, each its label and an image of one tile; labels are tokenised each on its own, as the
published serving code does it, so that their number of tokens does not depend on what stands around
them. Where embeddings are pruned, the first frames hold the places until the encoder has chosen.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from megatron_vl.data.frames import Clip
from megatron_vl.data.tokenizer import (
    END_OF_TURN,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    SPEAKER,
    SYSTEM,
    Tokenizer,
)
from megatron_vl.data.tools import calls_text, offer_text, results_text
from megatron_vl.sequence.counts import TAGS_PER_IMAGE
from megatron_vl.sequence.layout import UNSUPERVISED, Document
from megatron_vl.sequence.visual import ImageSpan, PatchGrid, VideoSpan, reserved_counts

Message = Mapping[str, Any]
Tool = Mapping[str, Any]

TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
OPEN_TRACE = "<think>\n"
NO_TRACE = "<think></think>"
ROLES = ("system", "user", "assistant", "tool")
VISUAL_KINDS = ("image", "video")

Visual = tuple[PatchGrid, ...] | Clip
"""An image's units, or a video as it is shown."""


@dataclass(frozen=True)
class Piece:
    """A stretch of a conversation that is tokenised on its own.

    kind: "text", "special" (text names the token), "image" or "video".
    turn: number of the assistant turn that is trained on it, or UNSUPERVISED.
    """

    kind: str
    text: str = ""
    turn: int = UNSUPERVISED


def content_parts(message: Message) -> list[tuple[str, str]]:
    """The parts of a message as ("text", text), ("image", "") and ("video", "") pairs.

    Raises:
        ValueError: an unknown role or part type, or a picture outside a system or user turn.
    """
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"a message has the role {role!r}; it must be one of {', '.join(ROLES)}")
    content = message["content"]
    if content is None and message.get("tool_calls"):
        return []
    if isinstance(content, str):
        return [("text", content)]
    parts: list[tuple[str, str]] = []
    for part in content:
        kind = part.get("type")
        if kind == "text":
            parts.append(("text", part["text"]))
        elif kind in VISUAL_KINDS and role in ("system", "user"):
            parts.append((kind, ""))
        else:
            raise ValueError(
                f"a part of a {role} message has the type {kind!r}; text is allowed everywhere, "
                "image and video in system and user messages"
            )
    return parts


def visual_parts(messages: Sequence[Message]) -> list[Mapping[str, Any]]:
    """The image and video parts of all messages, in order."""
    return [
        part
        for message in messages
        if isinstance(message["content"], Sequence) and not isinstance(message["content"], str)
        for part in message["content"]
        if part["type"] in VISUAL_KINDS
    ]


def reasoning_mode(messages: Sequence[Message], default: bool = True) -> bool:
    """Whether the last `/think` or `/no_think` of the system and user turns asks for a trace."""
    mode = default
    for message in messages:
        if message["role"] not in ("system", "user"):
            continue
        text = "".join(text if kind == "text" else " " for kind, text in content_parts(message))
        text = text.replace("</think>", "")
        on, off = text.rfind("/think"), text.rfind("/no_think")
        if on != off:
            mode = on > off
    return mode


def split_trace(text: str) -> tuple[str, str]:
    """The trace and the answer of an assistant text; the trace is empty if there is none."""
    head, mark, tail = text.strip().partition("</think>")
    if not mark:
        return "", head
    return head.replace("<think>", "").strip(), tail.strip()


def _without_switches(parts: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Parts without `/think` and `/no_think`, trimmed at both ends of the turn."""
    cleaned: list[tuple[str, str]] = []
    for kind, text in parts:
        text = text.replace("</think>", "\0").replace("/no_think", "").replace("/think", "")
        text = text.replace("\0", "</think>")
        if kind == "text" and cleaned and cleaned[-1][0] == "text":
            cleaned[-1] = ("text", cleaned[-1][1] + text)
        else:
            cleaned.append((kind, text))
    if cleaned and cleaned[0][0] == "text":
        cleaned[0] = ("text", cleaned[0][1].lstrip())
    if cleaned and cleaned[-1][0] == "text":
        cleaned[-1] = ("text", cleaned[-1][1].rstrip())
    return cleaned


def _prompt_turn(opening: str, parts: Sequence[tuple[str, str]]) -> list[Piece]:
    """Pieces of a system or user turn after its role token; text between pictures is one piece."""
    pieces: list[Piece] = []
    text = opening
    for kind, content in _without_switches(parts):
        if kind == "text":
            text += content
        else:
            pieces += [Piece("text", text), Piece(kind)]
            text = ""
    return [*pieces, Piece("text", text + "\n")]


def _assistant_turn(text: str, turn: int, keep_trace: bool) -> list[Piece]:
    trace, answer = split_trace(text)
    if trace and keep_trace:
        opening, body = OPEN_TRACE, f"{trace}\n</think>\n\n{answer}\n"
    else:
        opening, body = NO_TRACE, f"{answer}\n"
    return [
        Piece("special", SPEAKER),
        Piece("text", "Assistant\n" + opening),
        Piece("text", body, turn),
        Piece("special", END_OF_TURN, turn),
        Piece("text", "\n"),
    ]


def _system_turn(parts: Sequence[tuple[str, str]], tools: Sequence[Tool]) -> list[Piece]:
    *pieces, last = [Piece("special", SYSTEM), *_prompt_turn("System\n", parts)]
    if not tools:
        return [*pieces, last]
    said = last.text.removesuffix("\n")
    gap = "\n\n" if said.removeprefix("System\n") or len(pieces) > 1 else ""
    return [*pieces, Piece("text", f"{said}{gap}{offer_text(tools)}\n")]


def _results_turn(messages: Sequence[Message], index: int) -> list[Piece]:
    """The user turn of the results that begin at `index`; nothing inside a run of results."""
    if index and messages[index - 1]["role"] == "tool":
        return []
    run = takewhile(lambda message: message["role"] == "tool", messages[index:])
    results = ["".join(text for _, text in content_parts(message)) for message in run]
    return [Piece("special", SPEAKER), Piece("text", f"User\n{results_text(results)}\n")]


def _spoken_text(message: Message) -> str:
    """What an assistant message says, its calls at the end."""
    text = "".join(text for _, text in content_parts(message))
    if not message.get("tool_calls"):
        return text
    calls = calls_text(message["tool_calls"])
    return f"{text.rstrip()}\n\n{calls}" if text.strip() else calls


def conversation_pieces(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    reasoning: bool = True,
    tools: Sequence[Tool] = (),
) -> list[Piece]:
    """A conversation as pieces to tokenise, in order.

    Args:
        messages: a system message may stand first only.
        add_generation_prompt: open an assistant turn at the end.
        reasoning: mode of that turn where no message switches it.
        tools: functions the model may call.

    Raises:
        ValueError: a system message that is not the first.
    """
    roles = [message.get("role") for message in messages]
    if "system" in roles[1:]:
        raise ValueError(f"message {roles.index('system', 1)} is a system message; only 0 may be")
    system = content_parts(messages[0]) if roles[:1] == ["system"] else []
    pieces = _system_turn(system, tools)
    assistant = [index for index, role in enumerate(roles) if role == "assistant"]
    last = assistant[-1] if assistant and not add_generation_prompt else -1
    for index, message in enumerate(messages):
        parts = content_parts(message)
        if message["role"] == "user":
            pieces += [Piece("special", SPEAKER), *_prompt_turn("User\n", parts)]
        elif message["role"] == "assistant":
            text = _spoken_text(message)
            pieces += _assistant_turn(text, assistant.index(index), index == last)
        elif message["role"] == "tool":
            pieces += _results_turn(messages, index)
    if add_generation_prompt:
        opening = OPEN_TRACE if reasoning_mode(messages, reasoning) else NO_TRACE
        pieces += [Piece("special", SPEAKER), Piece("text", "Assistant\n" + opening)]
    return pieces


def _check_visuals(pieces: Sequence[Piece], visuals: Sequence[Visual]) -> None:
    asked = [piece.kind for piece in pieces if piece.kind in VISUAL_KINDS]
    given = ["video" if isinstance(visual, Clip) else "image" for visual in visuals]
    if asked != given:
        raise ValueError(
            f"the conversation shows {', '.join(asked) or 'no picture'}; what was given for it is "
            f"{', '.join(given) or 'nothing'}"
        )


class _Row:
    """A token row as it grows."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokens: list[int] = []
        self.visuals: list[ImageSpan | VideoSpan] = []
        self._start, self._image, self._end = map(tokenizer.id_of, (IMAGE_START, IMAGE, IMAGE_END))

    def _picture(self, embeddings: int) -> None:
        self.tokens += [self._start, *[self._image] * embeddings, self._end]

    def image(self, grids: tuple[PatchGrid, ...]) -> None:
        span = ImageSpan(start=len(self.tokens) + 1, grids=grids)
        self.visuals.append(span)
        self._picture(span.tokens)

    def video(self, clip: Clip, labels: Sequence[Sequence[int]]) -> None:
        span = VideoSpan(
            start=len(self.tokens),
            grid=clip.grid,
            before_F=tuple(len(label) + 1 for label in labels),
            after_F=(1,) * len(labels),
            kept=clip.kept,
        )
        self.visuals.append(span)
        counts = reserved_counts(span.num_frames, span.grid.tokens, span.kept)
        for label, count in zip(labels, counts, strict=True):
            self.tokens += label
            self._picture(count)


def encode_pieces(
    pieces: Sequence[Piece], tokenizer: Tokenizer, visuals: Sequence[Visual]
) -> Document:
    """Tokens of pieces; the pictures among them take the visuals in order.

    Raises:
        ValueError: pictures and visuals differ in number or kind.
    """
    _check_visuals(pieces, visuals)
    clips = [visual for visual in visuals if isinstance(visual, Clip)]
    texts = [piece.text for piece in pieces if piece.kind == "text"]
    labels = [label for clip in clips for label in clip.labels]
    encoded = tokenizer.encode_batch([*texts, *labels])
    encoded_texts, encoded_labels = iter(encoded[: len(texts)]), iter(encoded[len(texts) :])
    shown = iter(visuals)
    row = _Row(tokenizer)
    turns: list[int] = []
    for piece in pieces:
        if piece.kind == "text":
            row.tokens += next(encoded_texts)
        elif piece.kind == "special":
            row.tokens.append(tokenizer.id_of(piece.text))
        else:
            visual = next(shown)
            if isinstance(visual, Clip):
                row.video(visual, [next(encoded_labels) for _ in visual.labels])
            else:
                row.image(visual)
        turns += [piece.turn] * (len(row.tokens) - len(turns))
    return Document(
        tokens_N=np.array(row.tokens, dtype=np.int64),
        turn_ids_N=np.array(turns, dtype=np.int32),
        visuals=tuple(row.visuals),
    )


def encode_conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    visuals: Sequence[Visual] = (),
    *,
    add_generation_prompt: bool = False,
    reasoning: bool = True,
    tools: Sequence[Tool] = (),
) -> Document:
    """A conversation as tokens, turn ids and visual spans. See `conversation_pieces`."""
    pieces = conversation_pieces(
        messages, add_generation_prompt=add_generation_prompt, reasoning=reasoning, tools=tools
    )
    return encode_pieces(pieces, tokenizer, visuals)


def text_length(messages: Sequence[Message], tokenizer: Tokenizer) -> int:
    """Tokens of a conversation outside its pictures."""
    pieces = conversation_pieces(messages)
    texts = [piece.text for piece in pieces if piece.kind == "text"]
    special = sum(piece.kind == "special" for piece in pieces)
    return special + sum(map(len, tokenizer.encode_batch(texts)))


def visual_length(visual: Visual, tokenizer: Tokenizer) -> int:
    """Tokens of an image or video in a conversation: embeddings, tags and labels."""
    if isinstance(visual, Clip):
        labels = sum(map(len, tokenizer.encode_batch(visual.labels)))
        return labels + TAGS_PER_IMAGE * len(visual.labels) + visual.kept
    return TAGS_PER_IMAGE + sum(grid.tokens for grid in visual)


@lru_cache(maxsize=1)
def _template() -> jinja2.Template:
    environment = jinja2.Environment(keep_trailing_newline=False)
    # As transformers has it: jinja's own escapes what HTML would trip over.
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
    return environment.from_string(TEMPLATE_PATH.read_text(encoding="utf-8"))


def render_template(
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    reasoning: bool = True,
    tools: Sequence[Tool] = (),
) -> str:
    """The conversation as chat_template.jinja renders it.

    An image is one `<image>` and a video one `<video>`, for the server's processor to expand.
    """
    return _template().render(
        messages=messages,
        add_generation_prompt=add_generation_prompt,
        enable_thinking=reasoning,
        tools=tools or None,
    )
