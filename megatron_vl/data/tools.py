"""Functions a model may call: how they, its calls and their results stand in a conversation.

The tags and sentences are those the published models were trained with: the functions as JSON in
the system turn, calls as JSON in the assistant's, results in a user turn. `chat.py` places them;
`chat_template.jinja` writes the same text for servers.

Refuses functions and calls without a name.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

_OFFER = (
    "You can use the following tools to assist the user if required:\n"
    "<AVAILABLE_TOOLS>[{tools}]</AVAILABLE_TOOLS>\n\n"
    "If you decide to call any tool(s), use the following format:\n"
    '<TOOLCALL>[{{"name": "tool_name1", "arguments": "tool_args1"}}, '
    '{{"name": "tool_name2", "arguments": "tool_args2"}}]</TOOLCALL>\n\n'
    "The user will execute tool-calls and return responses from tool(s) in this format:\n"
    '<TOOL_RESPONSE>[{{"tool_response1"}}, {{"tool_response2"}}]</TOOL_RESPONSE>\n\n'
    "Based on the tool responses, you can call additional tools if needed, correct tool calls if "
    "any errors are found, or just respond to the user."
)
_CALLS = re.compile(r"<TOOLCALL>(\[.*?\])</TOOLCALL>", re.DOTALL)


def offer_text(tools: Sequence[Mapping[str, Any]]) -> str:
    """What the system turn says about the tools; empty without any.

    Args:
        tools: functions with name, description and parameters, or the same under "function".

    Raises:
        ValueError: a function without a name.
    """
    if not tools:
        return ""
    functions = [tool.get("function", tool) for tool in tools]
    nameless = [function for function in functions if not function.get("name")]
    if nameless:
        raise ValueError(
            f"a tool has no name: {_json(nameless[0])[:80]}; give it as "
            '{"name": ..., "description": ..., "parameters": {...}}'
        )
    return _OFFER.format(tools=", ".join(map(_json, functions)))


def calls_text(calls: Sequence[Mapping[str, Any]]) -> str:
    """The calls of an assistant turn, as it writes them.

    Args:
        calls: name and arguments (JSON text or an object), or the same under "function".

    Raises:
        ValueError: a call without a name or arguments.
    """
    written = []
    for call in calls:
        function = call.get("function", call)
        if not function.get("name") or "arguments" not in function:
            raise ValueError(f"a tool call needs name and arguments, it is {_json(call)[:80]}")
        arguments = function["arguments"]
        text = arguments if isinstance(arguments, str) else _json(arguments)
        written.append(f'{{"name": {_json(function["name"])}, "arguments": {text}}}')
    return f"<TOOLCALL>[{', '.join(written)}]</TOOLCALL>"


def results_text(results: Sequence[str]) -> str:
    """The results of the calls before, as the user turn says them."""
    return f"<TOOL_RESPONSE>[{', '.join(results)}]</TOOL_RESPONSE>"


def calls_in(answer: str) -> list[dict[str, Any]]:
    """The calls an answer makes: name and arguments each. What is no valid call is none."""
    found: list[dict[str, Any]] = []
    for block in _CALLS.findall(answer):
        try:
            listed = json.loads(block)
        except ValueError:
            continue
        found += [call for call in listed if isinstance(call, dict) and "name" in call]
    return found


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
