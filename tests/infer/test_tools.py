"""Tool calls in the conversation: the tokenised pieces against the template that servers get."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.chat import conversation_pieces, reasoning_mode, render_template
from megatron_vl.data.tools import calls_in, calls_text

WEATHER = {
    "name": "weather",
    "description": "Weather of a city <today & here>, it's free",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
OPENAI = {"type": "function", "function": WEATHER}
TEXT = st.lists(
    st.sampled_from(["", "hello", " there", "\n", "/think", "/no_think", "</think>", "é", '"']),
    max_size=4,
).map("".join)
CALL = st.builds(
    lambda name, text, plain: {
        "name": name,
        "arguments": json.dumps({"city": text}, ensure_ascii=False) if plain else {"city": text},
    },
    st.sampled_from(["weather", "read_file"]),
    st.sampled_from(["Bern", "Zürich", 'a "b"', "<x>"]),
    st.booleans(),
)
EXCHANGE = st.builds(
    lambda asked, said, calls, results, answer: [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": said, "tool_calls": calls},
        *({"role": "tool", "content": result} for result in results),
        {"role": "assistant", "content": answer},
    ],
    TEXT,
    st.one_of(st.none(), st.just(""), st.just("I look."), st.just("hm\n</think>\n\nI look.")),
    st.lists(CALL, min_size=1, max_size=2),
    st.lists(TEXT, max_size=3),
    TEXT,
)
SYSTEM = st.one_of(st.just([]), TEXT.map(lambda content: [{"role": "system", "content": content}]))


@settings(max_examples=200, deadline=None)
@given(
    SYSTEM,
    st.lists(EXCHANGE, max_size=2),
    st.sampled_from([(), (WEATHER,), (OPENAI, {**WEATHER, "name": "read_file"})]),
    st.booleans(),
)
def test_the_template_writes_what_is_tokenised(
    system: list[dict[str, Any]],
    exchanges: list[list[dict[str, Any]]],
    tools: tuple[dict[str, Any], ...],
    generate: bool,
) -> None:
    messages = system + [message for exchange in exchanges for message in exchange]
    pieces = conversation_pieces(messages, add_generation_prompt=generate, tools=tools)
    rendered = render_template(messages, add_generation_prompt=generate, tools=tools)
    assert "".join(piece.text for piece in pieces) == rendered


def test_a_conversation_with_tools_reads_as_published() -> None:
    messages = [
        {"role": "system", "content": "Be brief. /no_think"},
        {"role": "user", "content": "Weather in Bern?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"function": {"name": "weather", "arguments": {"city": "Bern"}}}],
        },
        {"role": "tool", "content": '{"sky": "/think"}'},
        {"role": "tool", "content": "12"},
    ]
    text = render_template(messages, add_generation_prompt=True, tools=[OPENAI])
    assert text.startswith(
        "<SPECIAL_10>System\nBe brief.\n\nYou can use the following tools to assist the user if "
        f"required:\n<AVAILABLE_TOOLS>[{json.dumps(WEATHER)}]</AVAILABLE_TOOLS>\n\nIf you decide"
    )
    assert text.endswith(
        "or just respond to the user.\n<SPECIAL_11>User\nWeather in Bern?\n"
        '<SPECIAL_11>Assistant\n<think></think><TOOLCALL>[{"name": "weather", "arguments": '
        '{"city": "Bern"}}]</TOOLCALL>\n<SPECIAL_12>\n'
        '<SPECIAL_11>User\n<TOOL_RESPONSE>[{"sky": "/think"}, 12]</TOOL_RESPONSE>\n'
        "<SPECIAL_11>Assistant\n<think></think>"
    )
    assert not reasoning_mode(messages)


def test_calls_are_read_back() -> None:
    calls = [{"name": "weather", "arguments": {"city": "Zürich"}}, {"name": "b", "arguments": "{}"}]
    text = f"I look.\n{calls_text(calls)}"
    assert calls_in(text) == [calls[0], {"name": "b", "arguments": {}}]
    assert calls_in("<TOOLCALL>[{broken]</TOOLCALL> and <TOOLCALL>[3]</TOOLCALL>") == []


@pytest.mark.parametrize("tool", [{}, {"function": {"description": "x"}}])
def test_a_tool_without_a_name_is_refused(tool: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="no name"):
        conversation_pieces([{"role": "user", "content": "?"}], tools=[tool])
    with pytest.raises(ValueError, match="needs name and arguments"):
        calls_text([{"name": "f"}])
