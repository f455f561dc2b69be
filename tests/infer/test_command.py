"""`mvl generate` over a run: it prints what was said and keeps it beside the run."""

import json
from pathlib import Path

import pytest
from PIL import Image

from launch.cli import parse
from megatron_vl.infer import generate

pytestmark = pytest.mark.distributed


def test_the_command_keeps_what_was_said_in_the_run(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["generate", str(small_run), "--held-out", "captions", "--count", "1"]
    arguments = parse([*command, "--max-new-tokens", "2"])
    assert generate.main(arguments) == 0
    (line,) = (small_run / "generate.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["answer"] in capsys.readouterr().out
    assert kept["reference"]
    assert Image.open(small_run / kept["image"]).size[0] > 0
