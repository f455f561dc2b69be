"""Readers of formats whose contents are typed parts: OpenAI's, Qwen's, the Nemotron VLM dataset v2.

A content is a string or a list of parts. Media have parts of their own, so `<image>` inside a text
is text. `read_openai` takes `{"type": "image_url", "image_url": {"url"}}` and the same for videos,
Qwen's `{"type": "image", "image"}`, `data:` URLs with the bytes in base64, and `file://` names.
`read_v2` takes the v2 dataset's `image` and `video` parts only; sound is refused.
"""

import base64
import binascii
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

from megatron_vl.data.convert.conversation import (
    Draft,
    Fault,
    Medium,
    Reason,
    check,
    mapping,
    media_part,
    optional_string,
    role_of,
    sequence,
    string,
    text_part,
)

PartReader = Callable[[dict[str, Any], str], dict[str, Any]]


def read_openai(row: dict[str, Any]) -> Draft:
    """A row of OpenAI-style or Qwen-style messages; raises Fault."""
    return _draft(row, _openai_part)


def read_v2(row: dict[str, Any]) -> Draft:
    """A row of the Nemotron VLM dataset v2; raises Fault."""
    return _draft(row, _v2_part)


def _draft(row: dict[str, Any], read_part: PartReader) -> Draft:
    messages = []
    for number, item in enumerate(sequence(row.get("messages"), "messages"), 1):
        turn = mapping(item, f"turn {number}")
        role = role_of(turn.get("role"))
        content = turn.get("content")
        if isinstance(content, str):
            parts = [text_part(content)]
        else:
            where = f"a part of turn {number}"
            given = sequence(content, f"turn {number}'s content")
            parts = [read_part(mapping(part, where), where) for part in given]
        messages.append({"role": role, "content": parts})
    check(messages)
    return Draft(
        messages,
        id=optional_string(row, "id"),
        source=optional_string(row, "source", "data_source"),
        license=optional_string(row, "license"),
    )


def _v2_part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return text_part(string(part.get("text"), f"the text of {where}"))
    if kind in ("image", "video"):
        return media_part(Medium(kind, string(part.get(kind), f"the {kind} of {where}")))
    raise Fault(Reason.WRONG_TYPE, f"{where} has the type {kind!r}; text, image and video are read")


def _openai_part(part: dict[str, Any], where: str) -> dict[str, Any]:
    kind = part.get("type")
    if kind in ("image_url", "video_url"):
        value = part.get(kind)
        url = value.get("url") if isinstance(value, dict) else value
        return media_part(_medium(kind[:5], string(url, f"the {kind} of {where}")))
    if kind in ("image", "video"):
        return media_part(_medium(kind, string(part.get(kind), f"the {kind} of {where}")))
    return _v2_part(part, where)


def _medium(kind: str, text: str) -> Medium:
    """The medium of a name or URL.

    Raises:
        Fault: it is on the network, or its base64 cannot be read.
    """
    if not text.startswith("data:"):
        return Medium(kind, local_name(text))
    head, comma, body = text.partition(",")
    if not comma or not head.endswith(";base64"):
        raise Fault(Reason.UNREADABLE, f"a data URL that is not base64: {head[:40]}")
    try:
        return Medium(kind, data=base64.b64decode(body, validate=True))
    except (binascii.Error, ValueError) as error:
        raise Fault(Reason.UNREADABLE, f"the base64 of a data URL: {error}") from error


def local_name(text: str) -> str:
    """The file a name or `file://` URL means; other URLs are left for the lookup to refuse."""
    return unquote(urlsplit(text).path) if text.startswith("file://") else text
