"""argparse with answers for a word it does not know: the nearest command or option.

Refuses what argparse refuses. Costs nothing until something is refused.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from typing import Any, NoReturn

COMMAND = "COMMAND"
"""The metavar of the places where a command's name stands."""


class Parser(argparse.ArgumentParser):
    """The parser of `mvl` and of each of its commands; `hidden` ones are for `mvl` itself."""

    hidden = False

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """End with a message about words that are no argument of this command."""
        options = sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", self.format_help())))
        said = f"unrecognized arguments: {' '.join(words)}"
        unknown = next((word for word in words if word.startswith("-")), None)
        if unknown is not None:
            near = difflib.get_close_matches(unknown.partition("=")[0], options, 1, 0.0)
            said += f"; nearest valid: {near[0]} (it takes {', '.join(options)})"
        self.error(said)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.metavar != COMMAND or action.choices is None or value in action.choices:
            super()._check_value(action, value)
            return
        parsers = dict(action.choices)
        shown = [name for name, parser in parsers.items() if not parser.hidden]
        near = difflib.get_close_matches(value, shown, 1, 0.0)
        raise argparse.ArgumentError(
            None, f"no command {value!r}; nearest valid: {near[0]} (there are {', '.join(shown)})"
        )
