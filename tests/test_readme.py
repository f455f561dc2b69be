"""Every `mvl` command of the README runs as written, on the test run's short run and small data."""

import json
import re
import shlex
import shutil
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
        words += [*short_run.overrides, "--until", "stage4"]
    if words[:2] == ["data", "prepare"]:
        words.append(f"data.root={tmp_path / 'laptop'}")
    if words[0] == "generate":
        words += ["--max-new-tokens", "2"]
    assert mvl(*words).stdout.strip()


@pytest.mark.slow
def test_submit_goes_on_to_the_release(short_run: ShortRun, tmp_path: Path) -> None:
    """The rest of the recipe, in a copy of the run: distillation and three certificates."""
    run = tmp_path / "run"
    shutil.copytree(short_run.path, run)
    words = next(words[1:] for words in readme_commands() if words[1] == "submit")
    words = [str(run) if word == "runs/demo" else word for word in words]
    mvl(*words, *short_run.overrides, seconds=1500)
    for form in ("bf16", "fp8", "nvfp4"):
        made = json.loads((run / "release" / form / "certificate.json").read_text())
        assert made["passed"]
