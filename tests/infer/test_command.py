"""`mvl generate` over a run: it prints what was said and keeps it beside the run."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from launch import infer_commands
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


def _unopened(path: Path) -> Any:
    raise AssertionError(f"{path} was opened before the question was looked at")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", "?", "--max-new-tokens", "0"], "max_new_tokens is 0; the least is 1"),
        (["--prompt", "?", "--reasoning-budget", "3"], "add --reasoning on"),
        (["--prompt", "?", "--temperature", "-1"], "the least is 0"),
        (["--prompt", "?", "--pages", "2"], "pages were given without a pdf"),
        (["--prompt", "?", "--image", "ABSENT.png"], "ABSENT"),
        (["--prompt", "?", "--tools", "ABSENT.json"], "ABSENT"),
        (["--held-out", "qa", "--image", "a.png"], "leave --image, --video, --pdf out"),
        (["--held-out", "qa", "--count", "0"], "--count is 0; the least is 1"),
    ],
)
def test_a_wrong_question_is_refused_before_the_model_opens(words: list[str], says: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        generate.main(parse(["generate", "runs/none", *words]), _unopened)


def test_what_is_no_model_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"absent is not there"):
        infer_commands.open_any(tmp_path / "absent").__enter__()
    for form in ("bf16", "fp8"):
        (tmp_path / form).mkdir()
        (tmp_path / form / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds exported folders, name one: \S+bf16, \S+fp8$"):
        infer_commands.open_any(tmp_path).__enter__()
    words = ["generate", str(tmp_path / "bf16"), "--held-out", "qa"]
    with pytest.raises(ValueError, match=r"has no data of its own.*--like STAGE\.yaml"):
        infer_commands.generate(parse(words))
