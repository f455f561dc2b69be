"""Readers of formats that write media as placeholders inside texts.

LLaVA and Nemotron VLM v1 rows: `{"id", "image": name or list, "conversations": [{"from",
"value"}]}`; v1 has one image a row and keeps where a page came from in `metadata`, which is not
taken over. LLaVA's video sets write `<image>` for their `video`: so it is read where a row has a
video, no image and no `<video>`.

ShareGPT rows have the same conversations, the media in `images` and `videos`, and may have a
`system` text of their own. The messages variant (LLaMA-Factory) has `messages` of `{"role",
"content"}` instead.
"""

from collections.abc import Mapping
from typing import Any

from megatron_vl.data.convert.conversation import (
    MEDIA_KINDS,
    Draft,
    Fault,
    Medium,
    Reason,
    check,
    mapping,
    optional_string,
    place_media,
    role_of,
    sequence,
    string,
)

Turns = list[tuple[str, str]]


def read_llava(row: dict[str, Any]) -> Draft:
    """A row of LLaVA's json or jsonl, or of the Nemotron VLM dataset v1; raises Fault."""
    return _draft(row, conversation_turns(row))


def read_sharegpt(row: dict[str, Any]) -> Draft:
    """A ShareGPT row; raises Fault."""
    return _draft(row, _with_system(row, conversation_turns(row)))


def read_messages(row: dict[str, Any]) -> Draft:
    """A row of ShareGPT's messages variant; raises Fault."""
    return _draft(row, _with_system(row, message_turns(row)))


def conversation_turns(row: Mapping[str, Any]) -> Turns:
    """Roles and texts of `conversations`; raises Fault."""
    return _turns(row, "conversations", "from", "value")


def message_turns(row: Mapping[str, Any]) -> Turns:
    """Roles and texts of `messages`, contents being strings; raises Fault."""
    return _turns(row, "messages", "role", "content")


def _turns(row: Mapping[str, Any], field: str, speaker: str, said: str) -> Turns:
    turns = []
    for number, item in enumerate(sequence(row.get(field), field), 1):
        turn = mapping(item, f"turn {number}")
        turns.append((role_of(turn.get(speaker)), string(turn.get(said), f"turn {number}'s text")))
    return turns


def _with_system(row: Mapping[str, Any], turns: Turns) -> Turns:
    """The turns behind the row's own `system` text, if it has one."""
    if row.get("system") in (None, ""):
        return turns
    return [("system", string(row["system"], "system")), *turns]


def declared_media(row: Mapping[str, Any]) -> dict[str, list[Medium]]:
    """Media of each kind the row has a field for: `image` or `images`, `video` or `videos`.

    Raises:
        Fault: a field is neither a name nor a list of names.
    """
    media: dict[str, list[Medium]] = {}
    for kind in MEDIA_KINDS:
        for field in (kind, f"{kind}s"):
            if row.get(field) is not None:
                given = row[field] if isinstance(row[field], list) else [row[field]]
                media.setdefault(kind, []).extend(_named(kind, item, field) for item in given)
    return media


def _named(kind: str, item: object, field: str) -> Medium:
    name = string(item, f"an entry of {field}")
    if not name:
        raise Fault(Reason.MISSING, f"an entry of {field} names no file")
    return Medium(kind, name)


def assemble(row: Mapping[str, Any], turns: Turns, media: Mapping[str, list[Medium]]) -> Draft:
    """The draft of a row whose turns and media are known; raises Fault."""
    if set(media) == {"video"} and not any("<video>" in text for _, text in turns):
        media = {"image": media["video"]}
    messages, notes = place_media(turns, media)
    check(messages)
    return Draft(
        messages,
        id=optional_string(row, "id"),
        source=optional_string(row, "source", "data_source"),
        license=optional_string(row, "license"),
        notes=notes,
    )


def _draft(row: dict[str, Any], turns: Turns) -> Draft:
    return assemble(row, turns, declared_media(row))
