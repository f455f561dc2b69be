"""The loopback cluster itself: up, down, and never left behind."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from slurm.loopback.cluster import Cluster
from slurm.loopback.packages import INSTALL, ClusterError, missing_programs
from slurm.loopback.processes import find_processes
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.distributed


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short path for a cluster's socket."""
    if absent := missing_programs():
        pytest.skip(f"no Slurm here ({', '.join(absent)}); to get it: {INSTALL}")
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as path:
        yield Path(path)


def test_a_cluster_goes_down_with_the_process_that_started_it(folder: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from slurm.loopback.cluster import Cluster\n"
        f"made = Cluster(Path({str(folder)!r}), nodes=1, gpus=0); made.up_while_alive()\n"
        "made.command('sbatch', '--output=/dev/null', '--wrap', 'sleep 600')\n"
        "print('up', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    conf = Cluster(folder).conf
    assert len(find_processes(conf)) >= 3
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 30
    while find_processes(conf):
        assert time.monotonic() < deadline, find_processes(conf)
        time.sleep(0.1)


def test_the_command_prints_what_a_shell_needs_and_takes_it_down(folder: Path) -> None:
    words = [sys.executable, "-m", "slurm.loopback"]
    up = subprocess.run(
        [*words, "up", str(folder), "--nodes", "1", "--gpus", "0"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    bystander = subprocess.Popen(
        ["sleep", "600"], env=os.environ | {"SLURM_CONF": str(Cluster(folder).conf)}
    )
    try:
        asked = f"{up.stdout}\nsinfo -h -o %D"
        found = subprocess.run(["bash", "-c", asked], capture_output=True, text=True, timeout=60)
        assert found.stdout.strip() == "1"
        last = up.stdout.splitlines()[-1].removeprefix("# to end it: python3").split()
        subprocess.run([sys.executable, *last], cwd=REPOSITORY, timeout=60, check=True)
        assert find_processes(Cluster(folder).conf) == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_down_without_a_cluster_says_what_to_name(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "slurm.loopback", "down", str(tmp_path / "none")]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"loopback: {tmp_path / 'none'} holds no cluster" in done.stderr


def test_a_path_too_long_for_a_socket_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="choose a shorter folder"):
        Cluster(tmp_path / ("long" * 30)).up()
