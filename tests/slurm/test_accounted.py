"""What Slurm has forgotten: told by its accounting where there is one, in plain words where not."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import main
from launch.slurm import queue
from tests.slurm.chains import FakeChain

pytestmark = pytest.mark.distributed
SACCT = """#!/bin/sh
# As `sacct -n -P -X -o JobName%200,JobID,State` of Slurm 22.05 prints it: a line a job.
printf '%s\\n' 'NAME|4711|FAILED' 'NAME|4712|CANCELLED by 1000'
"""


def status(made: FakeChain, capsys: pytest.CaptureFixture[str]) -> dict:
    capsys.readouterr()
    assert main(["status", str(made.run.path), "--json"]) == exit_codes.OK
    return json.loads(capsys.readouterr().out)["stages"][0]


def test_a_forgotten_job_is_told_by_sacct_and_without_it_nothing_is_made_up(
    make_chain: Callable[..., FakeChain],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_chain()
    # The loopback cluster keeps no accounts: the real sacct says so, with status 1.
    with pytest.raises(queue.SlurmError, match="accounting storage is disabled"):
        queue.command("sacct", "-S", "now")
    assert status(made, capsys)["status"] == "waiting"
    program = tmp_path / "bin" / "sacct"
    program.parent.mkdir()
    program.write_text(SACCT.replace("NAME", queue.job_name(made.run.path, "init")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    told = status(made, capsys)
    assert (told["status"], told["job"]) == ("waiting", "4712")
    assert told["reason"] == "job 4712 ended: CANCELLED"


def test_a_machine_without_slurm_shows_the_run_folder(
    make_chain: Callable[..., FakeChain],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = make_chain()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", "/nowhere")
        assert status(made, capsys)["status"] == "unknown"
        assert main(["status", str(made.run.path)]) == exit_codes.OK
        assert "Slurm cannot be asked here" in capsys.readouterr().out
        assert main(["report", str(made.run.path)]) == exit_codes.OK
        assert main(["cancel", str(made.run.path)]) == exit_codes.USAGE
        assert "needs a machine with Slurm's commands" in capsys.readouterr().err
