"""The guide for operators: its ten minutes run as written, on the test run's small data."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.causes import Cause
from launch.cli import build_parser
from launch.site_schema import RequeueSection
from launch.slurm.budget import Ending, decide
from megatron_vl.run.folder import RunFolder
from slurm.loopback.cluster import Cluster, start_keeper
from tests.conftest import REPOSITORY, SmallData

GUIDE = REPOSITORY / "docs" / "operators.md"
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def place(small_data: SmallData, tmp_path: Path) -> Path:
    """A folder that looks like the repository's root, with the small data where the guide's is."""
    for name in ("stages", "slurm"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "laptop").symlink_to(small_data.root)
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mvl"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m launch.cli "$@"\n')
    program.chmod(0o755)
    return tmp_path


@pytest.fixture
def own_cluster() -> Iterator[Path]:
    """A folder for the guide's own cluster, which goes down with the test, even a killed one."""
    with (
        tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder,
        start_keeper(Path(folder)) as keeper,
    ):
        yield Path(folder)
        keeper.communicate(timeout=30)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_ten_minutes_run_as_written(cluster: Cluster, place: Path, own_cluster: Path) -> None:
    """`cluster` is here to skip where there is no Slurm; the guide starts one of its own."""
    (block,) = BLOCK.findall(GUIDE.read_text())
    lines = [line for line in block.splitlines() if not line.startswith("mvl data prepare")]
    lines[0] = lines[0].replace("loopback up", f"loopback up {own_cluster}")
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
    environment |= {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONSAFEPATH": "1",
    }
    done = subprocess.run(
        ["bash", "-eux", "-c", "\n".join(lines)],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=560,
    )
    assert done.returncode == 0, done.stdout
    run = RunFolder(place / "runs" / "first")
    for name in ("stage0", "stage1"):
        receipt = run.stage(name).receipt()
        assert receipt is not None
        assert receipt.done
    told = [event for event in run.journal.read() if event["stage"] == "stage0"]
    starts = [event["from_step"] for event in told if event["event"] == "started"]
    assert starts[0] == 0
    assert starts[1] >= 10
    assert "stopped" in done.stdout


def test_every_command_of_the_guide_is_one() -> None:
    parser = build_parser()
    text = GUIDE.read_text()
    commands = [line for block in BLOCK.findall(text) for line in block.split("\n")]
    commands += re.findall(r"^    (mvl .+)$", text, re.MULTILINE)
    commands = [line for line in commands if line.startswith("mvl ")]
    for words in (shlex.split(line, comments=True) for line in commands):
        found, rest = parser.parse_known_args(words[1:])
        assert all("=" in word for word in rest), words
        assert found.command in (
            "plan", "submit", "status", "logs", "resume", "report", "data", "nodes",
        )  # fmt: skip


def test_the_table_of_classes_tells_what_the_code_does() -> None:
    rows = re.findall(r"^\| (`.+?) \| .+ \| (.+) \|$", GUIDE.read_text(), re.MULTILINE)
    told = {name: text for names, text in rows for name in re.findall(r"`(\w+)`", names)}
    assert set(told) == {cause.value for cause in Cause}
    for cause in Cause:
        again = decide(Ending(cause, True), [], RequeueSection()).again
        assert ("starts again" in told[cause.value]) == again
