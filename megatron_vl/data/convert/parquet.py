"""Reader of Hugging Face parquet files, images inside as `{"bytes", "path"}`.

FineVision and the_cauldron rows are `{"images": [...], "texts": [{"user", "assistant"}]}`: the
images stand in front of the first question, and `<image>` in a text is text. Rows with
`conversations` or `messages` beside `image` or `images` are read by the rules of `turns.py`.
"""

from typing import Any

from megatron_vl.data.convert.conversation import (
    Draft,
    Fault,
    Medium,
    Reason,
    check,
    mapping,
    media_part,
    optional_string,
    sequence,
    string,
    text_part,
)
from megatron_vl.data.convert.turns import assemble, conversation_turns, message_turns


def read_parquet(row: dict[str, Any]) -> Draft:
    """One row as pyarrow gives it; raises Fault."""
    images = _images(row)
    if row.get("texts") is None:
        has_conversations = row.get("conversations") is not None
        turns = conversation_turns(row) if has_conversations else message_turns(row)
        return assemble(row, turns, {} if images is None else {"image": images})
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(sequence(row["texts"], "texts"), 1):
        pair = mapping(item, f"pair {number}")
        for role in ("user", "assistant"):
            text = string(pair.get(role), f"the {role} of pair {number}")
            messages.append({"role": role, "content": [text_part(text)]})
    if messages:
        messages[0]["content"][:0] = [media_part(image) for image in images or ()]
    check(messages)
    return Draft(
        messages,
        id=optional_string(row, "id"),
        source=optional_string(row, "source", "data_source"),
        license=optional_string(row, "license"),
    )


def _images(row: dict[str, Any]) -> list[Medium] | None:
    """The row's images; None where it has no column for them.

    Raises:
        Fault: an entry that is no image.
    """
    given = row.get("images", row.get("image"))
    if given is None:
        return None
    media = []
    for item in given if isinstance(given, list) else [given]:
        if isinstance(item, bytes):
            media.append(Medium("image", data=item))
            continue
        entry = mapping(item, "an image")
        if isinstance(entry.get("bytes"), bytes):
            media.append(Medium("image", data=entry["bytes"]))
        elif isinstance(entry.get("path"), str) and entry["path"]:
            media.append(Medium("image", entry["path"]))
        else:
            raise Fault(Reason.MISSING, "an image with neither bytes nor a path")
    return media
