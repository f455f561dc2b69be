"""The readers' rules, row by row: placeholders, roles, parts, and what each refusal says."""

import base64
from typing import Any

import pytest

from megatron_vl.data.convert.conversation import Draft, Fault, Medium, Reason
from megatron_vl.data.convert.formats import FORMATS
from tests.data.convert.pictures import album

PNG = next(data for name, data in album().items() if name.endswith("png"))


def read(format_name: str, row: dict[str, Any]) -> list[tuple[str, list[Any]]]:
    """Roles and parts of a row: texts as they are, media as their names or bytes."""
    return shown(FORMATS[format_name].read(row))


def shown(draft: Draft) -> list[tuple[str, list[Any]]]:
    def value(part: dict[str, Any]) -> Any:
        found = part[part["type"]]
        return found if isinstance(found, str) else (found.kind, found.data or found.name)

    return [
        (message["role"], [value(part) for part in message["content"]])
        for message in draft.messages
    ]


def talk(*pairs: str, **fields: Any) -> dict[str, Any]:
    """A row of conversations, human and gpt in turn."""
    turns = [
        {"from": ("human", "gpt")[index % 2], "value": text} for index, text in enumerate(pairs)
    ]
    return {"conversations": turns, **fields}


@pytest.mark.parametrize(
    ("fields", "ask", "parts"),
    [
        ({"image": "a"}, "<image>\nwhat?", [("image", "a"), "\nwhat?"]),
        ({"image": "a"}, "so <image> what?", ["so ", ("image", "a"), " what?"]),
        ({"image": "a"}, "what?\n<image>", ["what?\n", ("image", "a")]),
        ({"image": "a"}, "what?", [("image", "a"), "what?"]),
        ({"image": "a"}, "<image>", [("image", "a")]),
        ({"image": ["a", "b"]}, "<image><image>x", [("image", "a"), ("image", "b"), "x"]),
        ({"image": "a"}, "<image> of a <video>", [("image", "a"), " of a <video>"]),
        ({}, "the tag <image>", ["the tag <image>"]),
        ({"image": None}, "the tag <image>", ["the tag <image>"]),
        ({"image": []}, "no tag", ["no tag"]),
        ({"video": "v"}, "<video> what?", [("video", "v"), " what?"]),
        ({"video": "v"}, "<image> what?", [("video", "v"), " what?"]),
        ({"video": "v"}, "what?", [("video", "v"), "what?"]),
        (
            {"image": "a", "video": "v"},
            "<video>then<image>",
            [("video", "v"), "then", ("image", "a")],
        ),
    ],
)
def test_placeholders(fields: dict[str, Any], ask: str, parts: list[Any]) -> None:
    assert read("llava", talk(ask, "so", **fields)) == [("user", parts), ("assistant", ["so"])]


@pytest.mark.parametrize(
    ("fields", "ask"),
    [
        ({"image": ["a", "b"]}, "what?"),
        ({"image": ["a", "b"]}, "<image> what?"),
        ({"image": "a"}, "<image> and <image>"),
        ({"image": []}, "<image> what?"),
        ({"image": "a", "video": "v"}, "<image> what?"),
        ({"image": "a", "video": []}, "<image> <video>"),
    ],
)
def test_placeholders_that_do_not_fit(fields: dict[str, Any], ask: str) -> None:
    with pytest.raises(Fault) as caught:
        read("llava", talk(ask, "so", **fields))
    assert caught.value.reason is Reason.PLACEHOLDERS


def test_answers_hold_no_placeholders_and_are_noted() -> None:
    row = talk("<image> what tag is it?", "it is <image>", image="a")
    draft = FORMATS["llava"].read(row)
    assert shown(draft)[1] == ("assistant", ["it is <image>"])
    assert draft.notes == [(Reason.LITERAL, "<image> in a assistant turn")]
    whole = talk("what tag?", "<image>", image="a")
    assert read("llava", whole)[0] == ("user", [("image", "a"), "what tag?"])
    assert read("llava", whole)[1] == ("assistant", ["<image>"])


def test_single_image_without_a_user_turn() -> None:
    row = {"image": "a", "conversations": [{"from": "gpt", "value": "a caption"}]}
    with pytest.raises(Fault, match="no user turn"):
        read("llava", row)


def test_media_in_later_turns_come_in_order() -> None:
    row = talk("one <image>", "1", "two <image> and <image>", "2", images=["a", "b", "c"])
    found = read("sharegpt", row)
    assert [part for _, parts in found for part in parts if isinstance(part, tuple)] == [
        ("image", "a"), ("image", "b"), ("image", "c"),
    ]  # fmt: skip
    assert found[2] == ("user", ["two ", ("image", "b"), " and ", ("image", "c")])


def test_system_texts() -> None:
    row = talk("hello", "hi", system="be brief")
    assert read("sharegpt", row)[0] == ("system", ["be brief"])
    assert read("sharegpt", talk("hello", "hi", system=""))[0][0] == "user"
    inside = {"conversations": [{"from": "system", "value": "s"}, *talk("q", "a")["conversations"]]}
    assert [role for role, _ in read("llava", inside)] == ["system", "user", "assistant"]
    with pytest.raises(Fault, match="turn 2 is a system turn"):
        read("sharegpt", {**inside, "system": "another"})


def test_messages_variant() -> None:
    row = {
        "messages": [
            {"role": "user", "content": "<image>what?"},
            {"role": "assistant", "content": "so"},
        ],
        "images": ["a"],
        "id": 7,
        "license": "cc0",
        "source": "web",
    }
    draft = FORMATS["messages"].read(row)
    assert (draft.id, draft.license, draft.source) == ("7", "cc0", "web")
    assert shown(draft) == [("user", [("image", "a"), "what?"]), ("assistant", ["so"])]


@pytest.mark.parametrize("word", ["tool", "GPT", "", None, 3, ["user"]])
def test_unknown_speakers_are_refused(word: Any) -> None:
    row = talk("q", "a")
    row["conversations"][1]["from"] = word
    with pytest.raises(Fault) as caught:
        read("llava", row)
    assert caught.value.reason is Reason.UNKNOWN_ROLE


def test_developer_is_system() -> None:
    row = {
        "messages": [
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": "a"},
        ]
    }
    assert read("openai", row)[0] == ("system", ["be brief"])


def part_row(*parts: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": [{"type": "text", "text": "so"}]},
        ]
    }


@pytest.mark.parametrize(
    ("part", "medium"),
    [
        ({"type": "image", "image": "a/b.jpg"}, ("image", "a/b.jpg")),
        ({"type": "image", "image": "file:///data/a%20b.jpg"}, ("image", "/data/a b.jpg")),
        ({"type": "image_url", "image_url": {"url": "a.jpg", "detail": "low"}}, ("image", "a.jpg")),
        ({"type": "image_url", "image_url": "a.jpg"}, ("image", "a.jpg")),
        ({"type": "video", "video": "a.mp4", "fps": 2}, ("video", "a.mp4")),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, ("video", "a.mp4")),
        (
            {"type": "image", "image": f"data:image/png;base64,{base64.b64encode(PNG).decode()}"},
            ("image", PNG),
        ),
    ],
)
def test_openai_parts(part: dict[str, Any], medium: tuple[str, Any]) -> None:
    text = {"type": "text", "text": "<image> is text here"}
    assert read("openai", part_row(part, text))[0] == ("user", [medium, "<image> is text here"])


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url", "image_url": None}, Reason.WRONG_TYPE),
        ({"type": "image"}, Reason.WRONG_TYPE),
        ({"type": "video", "video": ["1.jpg", "2.jpg"]}, Reason.WRONG_TYPE),
        ({"type": "audio", "audio": "a.wav"}, Reason.WRONG_TYPE),
        ({"text": "no type"}, Reason.WRONG_TYPE),
        ("a text", Reason.WRONG_TYPE),
        ({"type": "image", "image": "data:image/png;base64,@@"}, Reason.UNREADABLE),
        ({"type": "image", "image": "data:image/png,plain"}, Reason.UNREADABLE),
    ],
)
def test_openai_parts_that_cannot_be_used(part: Any, reason: Reason) -> None:
    with pytest.raises(Fault) as caught:
        read("openai", part_row(part, {"type": "text", "text": "x"}))
    assert caught.value.reason is reason


def test_media_in_answers_are_refused() -> None:
    row = part_row({"type": "text", "text": "draw"})
    row["messages"][1]["content"].append({"type": "image", "image": "a.jpg"})
    for name in ("openai", "nemotron-v2"):
        with pytest.raises(Fault) as caught:
            read(name, row)
        assert caught.value.reason is Reason.MISPLACED


def test_v2_takes_names_only() -> None:
    row = part_row({"type": "image", "image": "data:image/png;base64,xx", "metadata": {}})
    assert read("nemotron-v2", row)[0][1] == [("image", "data:image/png;base64,xx")]
    with pytest.raises(Fault):
        read("nemotron-v2", part_row({"type": "image_url", "image_url": "a"}))
    plain = {
        "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        "id": "x",
    }
    assert read("nemotron-v2", plain) == [("user", ["q"]), ("assistant", ["a"])]


def test_parquet_rows() -> None:
    pairs = [{"user": "what <image>?", "assistant": "so"}, {"user": "and", "assistant": "then"}]
    row = {"images": [{"bytes": PNG, "path": "x"}, {"bytes": None, "path": "b"}], "texts": pairs}
    assert read("hf-parquet", row) == [
        ("user", [("image", PNG), ("image", "b"), "what <image>?"]),
        ("assistant", ["so"]),
        ("user", ["and"]),
        ("assistant", ["then"]),
    ]
    row = {"image": {"bytes": PNG}, **talk("<image>q", "a"), "data_source": "set"}
    draft = FORMATS["hf-parquet"].read(row)
    assert draft.source == "set"
    assert shown(draft)[0] == ("user", [("image", PNG), "q"])
    row = {"image": None, **talk("the tag <image>", "a")}
    assert read("hf-parquet", row)[0] == ("user", ["the tag <image>"])
    row = {"images": [PNG], "messages": [{"role": "user", "content": "q"}]}
    with pytest.raises(Fault, match="no assistant turn"):
        read("hf-parquet", row)


def test_what_says_nothing_is_refused() -> None:
    for row in (talk("q", " "), talk(" ", "a"), talk("q", "a", "", "b")):
        with pytest.raises(Fault) as caught:
            read("llava", row)
        assert caught.value.reason is Reason.EMPTY
    assert read("llava", talk("<image>", "a cat", image="a"))[0] == ("user", [("image", "a")])


def test_media_are_named_once() -> None:
    assert Medium("image", "a") == Medium("image", "a", None)
    with pytest.raises(Fault, match="names no file"):
        read("llava", talk("q", "a", image=""))
