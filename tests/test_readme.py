"""Every `mvl` command of the README runs as written, on the test run's short run and small data."""

import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY, ShortRun, mvl

SHELL_BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


def readme_commands() -> list[list[str]]:
    """The words of each command of the README's shell blocks, comments left out."""
    text = (REPOSITORY / "README.md").read_text()
    lines = [line for block in SHELL_BLOCK.findall(text) for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


def test_the_readme_shows_every_step_of_a_run() -> None:
    assert {words[0] for words in readme_commands()} == {"mvl"}
    verbs = {words[1] for words in readme_commands()}
    assert {"plan", "data", "submit", "status", "logs", "report", "generate", "config"} <= verbs


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_command(command: list[str], short_run: ShortRun, tmp_path: Path) -> None:
    words = [str(short_run.path) if word == "runs/demo" else word for word in command[1:]]
    if words[0] == "submit":
        words += short_run.overrides
    if words[:2] == ["data", "prepare"]:
        words.append(f"data.root={tmp_path / 'laptop'}")
    if words[0] == "generate":
        words += ["--max-new-tokens", "2"]
    assert mvl(*words).stdout.strip()
