"""The internal form every reader makes: v2 messages with typed parts, and what may be wrong.

A reader (`llava.py`, `parquet.py` ...) turns one row of a public format into a `Draft`: messages
whose content is a list of parts, `{"type": "text", "text"}`, `{"type": "image", "image"}` and
`{"type": "video", "video"}`, where a medium is still a `Medium`: a name, or the bytes themselves.
Whatever keeps a row from training is a `Fault` with one of the reasons below; nothing is mended in
silence.

Placeholders. Formats that write media as `<image>` and `<video>` inside texts share `place_media`:
- only system and user turns have placeholders; in an answer the words are text;
- a row without a field for a kind of media has none of that kind, and the word is text there; the
  report notes such rows;
- otherwise placeholders and media must be equally many, taken in order; a row with a single medium
  and no placeholder has it put first in its first user turn.
Formats with typed parts have no placeholders: the words are always text. Text never becomes a
special token: the tokenizer sees to that.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

MEDIA_KINDS = ("image", "video")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
"""What speakers are called in the formats, and the role each is."""

_PLACEHOLDER = re.compile("<(?:image|video)>")


class Reason(StrEnum):
    """Why a row was dropped, or what is worth knowing of one that was kept."""

    BAD_JSON = "bad json"
    WRONG_TYPE = "wrong type"
    UNKNOWN_ROLE = "unknown role"
    NO_ANSWER = "no assistant turn"
    EMPTY = "empty content"
    PLACEHOLDERS = "placeholder count"
    MISPLACED = "misplaced turn or medium"
    BAD_TEXT = "text that is no unicode"
    MISSING = "missing medium"
    UNREADABLE = "unreadable medium"
    REMOTE = "remote medium"
    OUTSIDE = "medium outside its root"
    DUPLICATE_ID = "duplicate id"
    LITERAL = "placeholder as text"

    @property
    def keeps(self) -> bool:
        """A note on a row that was kept, not a fault."""
        return self in (Reason.DUPLICATE_ID, Reason.LITERAL)


class Fault(ValueError):
    """Something that keeps one row from training."""

    def __init__(self, reason: Reason, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Medium:
    """An image or video of a row: its name as the row gives it, or the bytes the row carries."""

    kind: str
    name: str = ""
    data: bytes | None = None


@dataclass
class Draft:
    """One row in the internal form.

    messages: parts of media hold a `Medium` under the name of their kind.
    id, source, license: as the row gives them, None where it does not.
    notes: reasons that keep the row, with their detail.
    """

    messages: list[dict[str, Any]]
    id: str | None = None
    source: str | None = None
    license: str | None = None
    notes: list[tuple[Reason, str]] = field(default_factory=list)


def text_part(text: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": text}


def media_part(medium: Medium) -> dict[str, Any]:
    """A part whose medium is still to be found."""
    return {"type": medium.kind, medium.kind: medium}


def string(value: object, what: str) -> str:
    """The value, which must be a string.

    Raises:
        Fault: it is something else.
    """
    if not isinstance(value, str):
        raise Fault(Reason.WRONG_TYPE, f"{what} is {_shown(value)}, not a string")
    return value


def mapping(value: object, what: str) -> dict[str, Any]:
    """The value, which must be an object; raises Fault as `string` does."""
    if not isinstance(value, dict):
        raise Fault(Reason.WRONG_TYPE, f"{what} is {_shown(value)}, not an object")
    return value


def sequence(value: object, what: str) -> list[Any]:
    """The value, which must be a list; raises Fault as `string` does."""
    if not isinstance(value, list):
        raise Fault(Reason.WRONG_TYPE, f"{what} is {_shown(value)}, not a list")
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def role_of(word: object) -> str:
    """The role a format's word for a speaker means.

    Raises:
        Fault: no such speaker.
    """
    role = ROLES.get(word) if isinstance(word, str) else None
    if role is None:
        raise Fault(
            Reason.UNKNOWN_ROLE, f"the speaker {_shown(word)}; known are {', '.join(ROLES)}"
        )
    return role


def optional_string(row: Mapping[str, Any], *keys: str) -> str | None:
    """The first of these fields that says something; numbers count as their digits."""
    for key in keys:
        value = row.get(key)
        if isinstance(value, str | int) and not isinstance(value, bool) and value != "":
            return str(value)
    return None


def place_media(
    turns: Sequence[tuple[str, str]], media: Mapping[str, Sequence[Medium]]
) -> tuple[list[dict[str, Any]], list[tuple[Reason, str]]]:
    """Messages with media where the placeholders stand, and notes; see the module's rules.

    Args:
        turns: role and text of each.
        media: the media that stand for each kind of placeholder, in order; no entry where the row
            has no field for them.

    Raises:
        Fault: placeholders and media differ in number.
    """
    given = {f"<{kind}>": found for kind, found in media.items()}
    split = [[text] if role == "assistant" else _split(text, given) for role, text in turns]
    counts = dict.fromkeys(given, 0)
    for (role, _), pieces in zip(turns, split, strict=True):
        for tag in given if role != "assistant" else ():
            counts[tag] += pieces.count(tag)
    alone = [tag for tag, found in given.items() for _ in found]
    if len(alone) == 1 and not sum(counts.values()):
        first = next((at for at, (role, _) in enumerate(turns) if role == "user"), None)
        if first is None:
            raise Fault(Reason.PLACEHOLDERS, "a medium, and no user turn that could show it")
        split[first].insert(0, alone[0])
        counts[alone[0]] = 1
    for tag, count in counts.items():
        if count != len(given[tag]):
            raise Fault(Reason.PLACEHOLDERS, f"{count} {tag} for {len(given[tag])} media")
    waiting = {tag: iter(found) for tag, found in given.items()}
    notes = []
    messages = []
    for (role, _), pieces in zip(turns, split, strict=True):
        parts = []
        for piece in pieces:
            if piece in waiting and role != "assistant":
                parts.append(media_part(next(waiting[piece])))
            elif piece:
                parts.append(text_part(piece))
                if literal := _PLACEHOLDER.search(piece):
                    notes.append((Reason.LITERAL, f"{literal[0]} in a {role} turn"))
        messages.append({"role": role, "content": parts})
    return messages, notes


def _split(text: str, tags: Iterable[str]) -> list[str]:
    """Text and these placeholders, in order."""
    pattern = "|".join(map(re.escape, tags))
    return re.split(f"({pattern})", text) if pattern else [text]


def check(messages: Sequence[Mapping[str, Any]]) -> None:
    """Refuse what cannot be trained on.

    Raises:
        Fault: no turn of an assistant; a turn that says nothing; a system turn that is not the
            first; media in an answer; text that cannot be written as UTF-8.
    """
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise Fault(Reason.NO_ANSWER, f"the turns are {', '.join(roles) or 'none'}")
    if "system" in roles[1:]:
        raise Fault(Reason.MISPLACED, f"turn {roles.index('system', 1) + 1} is a system turn")
    for number, message in enumerate(messages, 1):
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        media = len(message["content"]) - len(texts)
        if media and message["role"] == "assistant":
            raise Fault(Reason.MISPLACED, f"turn {number} is an answer with a medium in it")
        if not media and not "".join(texts).strip() and message["role"] != "system":
            raise Fault(Reason.EMPTY, f"turn {number} ({message['role']}) says nothing")
        for text in texts:
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise Fault(
                    Reason.BAD_TEXT, f"turn {number} holds half a surrogate pair"
                ) from error
