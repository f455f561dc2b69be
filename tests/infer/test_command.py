"""`mvl generate` over a run: it prints what was said and keeps it beside the run."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image

from megatron_vl.infer import generate

pytestmark = pytest.mark.distributed


def test_the_command_keeps_what_was_said_in_the_run(
    small_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = Namespace(
        checkpoint=str(small_run),
        held_out="captions",
        count=1,
        prompt=None,
        image=None,
        reasoning="off",
        max_new_tokens=2,
    )
    assert generate.main(arguments) == 0
    (line,) = (small_run / "generate.jsonl").read_text().splitlines()
    kept = json.loads(line)
    assert kept["answer"] in capsys.readouterr().out
    assert kept["reference"]
    assert Image.open(small_run / kept["image"]).size[0] > 0
