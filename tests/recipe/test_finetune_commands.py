"""The README's commands for fine-tuning a released model, as written, at the laptop's sizes.

The released folder is an export of the laptop's released parts put together, the recipe a copy
with fewer and smaller steps and a shorter certificate, the site this machine. Everything else is
what a user does.
"""

import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from launch import exit_codes
from launch.cli import main
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import eval_lines, read_metrics
from tests.conftest import LAPTOP, REPOSITORY

RECIPE = "stages/finetune_12b"
SIZES = {
    "tensor: 8": "tensor: 1",
    "sequence: true": "sequence: false",
    "encoder: 32": "encoder: 4",
    "sequence_length: 16384": "sequence_length: 512",
    "max_tiles_per_pack: 64": "max_tiles_per_pack: 0",
    "global_batch: 32": "global_batch: 2",
    "steps: 2000": "steps: 4",
    "every: 200": "every: 2",
    "every: 60": "every: 3",
}
"""What the copy of the recipe says, and what it says at the laptop's size."""


def commands() -> list[list[str]]:
    """The commands of the README's block on fine-tuning, in order."""
    text = (REPOSITORY / "README.md").read_text()
    found = re.search(r"^Fine-tuning the released.*?^```\n(.*?)^```", text, re.M | re.S)
    assert found, "the README has no block on fine-tuning"
    return [shlex.split(line, comments=True) for line in found[1].splitlines()]


def write_pictures(folder: Path, count: int) -> None:
    """LLaVA's json about discs of three colours; the file of its last row is missing."""
    draw = random.Random(7)
    (folder / "images").mkdir(parents=True)
    rows = []
    for number in range(count + 1):
        colour = draw.choice(["red", "green", "blue"])
        said = (("human", "<image>\nWhat is shown?"), ("gpt", f"A {colour} disc."))
        turns = [{"from": who, "value": text} for who, text in said]
        rows.append({"id": f"row{number}", "image": f"{number}.png", "conversations": turns})
        if number < count:
            size = (draw.randrange(60, 140), draw.randrange(60, 140))
            picture = Image.new("RGB", size, "white")
            ImageDraw.Draw(picture).ellipse((8, 8, 50, 50), fill=colour)
            picture.save(folder / "images" / f"{number}.png")
    (folder / "train.json").write_text(json.dumps(rows))


def write_recipe(base: Path) -> None:
    """Copy the recipe over the laptop's base in the place of the 12B's."""
    shutil.copytree(REPOSITORY / RECIPE, base / RECIPE)
    full = base / "stages" / "nano_12b_v2_vl"
    full.mkdir()
    shutil.copy(LAPTOP / "base.yaml", full)
    left = set(SIZES)
    for path in (base / RECIPE).glob("*.yaml"):
        text = path.read_text()
        for published, small in SIZES.items():
            if published in text:
                left.remove(published)
                text = text.replace(published, small)
        path.write_text(text)
    assert not left, f"{RECIPE} does not say {left}"
    with (base / RECIPE / "release.yaml").open("a") as file:
        file.write("arguments: [--bound=prompts=8, --bound=new_tokens=4]\n")


def write_released(out: Path, scratch: Path) -> None:
    """The laptop's released decoder and encoder as one published folder."""
    parts = LAPTOP / "released"
    words = ["--decoder", str(parts / "decoder"), "--encoder", str(parts / "encoder")]
    like = ["--like", str(LAPTOP / "stage0.yaml")]
    assert main(["checkpoint", "assemble", *words, str(scratch), *like]) == exit_codes.OK
    tokenizer = ["--tokenizer", str(parts / "decoder" / "tokenizer.json")]
    assert main(["checkpoint", "export", str(scratch), str(out), *tokenizer]) == exit_codes.OK


def run_words(words: list[str], base: Path) -> subprocess.CompletedProcess[str]:
    """Run one command in a user's folder."""
    if words[0] == "mvl":
        words = [sys.executable, "-m", "launch.cli", *words[1:]]
    return subprocess.run(
        words,
        cwd=base,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1500,
        check=False,
    )


def test_the_commands_name_every_step() -> None:
    verbs = [" ".join(words[1:3]) if words[0] == "mvl" else words[0] for words in commands()]
    assert verbs == [
        "data convert", "checkpoint import", "cp", f"submit {RECIPE}", "generate runs/mine",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_commands_run_as_written(tmp_path: Path) -> None:
    """From a picture folder and a released folder to a certified one and an answer."""
    write_released(tmp_path / "HF_FOLDER", tmp_path / "start")
    write_pictures(tmp_path / "my", 160)
    write_recipe(tmp_path)
    shutil.copy(REPOSITORY / "slurm" / "sites" / "local.yaml", tmp_path / "my_site.yaml")
    shutil.copy(tmp_path / "my" / "images" / "3.png", tmp_path / "picture.png")

    said = {}
    for words in commands():
        if words[1] == "submit":
            early = run_words([*words, "--follow", "--run", "runs/early"], tmp_path)
            assert early.returncode == exit_codes.HELD
            assert "mvl checkpoint import HF" in early.stdout
            words = [*words, "--follow"]  # on this machine alone it would go to the background
        done = run_words(words, tmp_path)
        assert done.returncode == exit_codes.OK, f"{shlex.join(words)}\n{done.stdout}"
        said[words[1]] = done.stdout

    assert "dropped: missing medium" in said["data"]
    assert "160 of 161 rows kept" in said["data"]
    run = RunFolder(tmp_path / "runs" / "mine")
    tune = run.stage("tune")
    receipt = tune.receipt()
    assert receipt is not None
    assert receipt.done
    assert receipt.parent is not None
    assert receipt.parent.stage == "init"
    losses = [line["loss"] for line in eval_lines(read_metrics(tune.metrics_path))]
    assert losses[-1] < losses[0]
    certificate = json.loads((run.path / "release" / "bf16" / "certificate.json").read_text())
    assert certificate["passed"]
    assert "What is shown?" in said["generate"]
