"""Jobs that a queue holds, and which of them a second submission lets start: a small made-up queue;
`tests/slurm/test_held.py` holds the same against a real one."""

import errno
import os
import re
from pathlib import Path

import pytest

from launch import exit_codes, submit
from launch.cli import main
from launch.graph import Selection
from launch.slurm import chain, queue
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder
from tests.launch.small_recipe import write_recipe


class Queue:
    """What `sbatch`, `squeue` and `scontrol` do with a few jobs that never run."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self.names: dict[str, str] = {}
        self.submitted = 0

    def __call__(self, *words: str, environment: dict[str, str] | None = None) -> str:
        if words[0] == "squeue":
            rows = [(job, self.names[job], self.reasons[job]) for job in self.names]
            return "\n".join(f"{j}|{name}|PENDING|{reason}|1:00|N/A" for j, name, reason in rows)
        if words[0] == "sbatch" and "--test-only" not in words:
            self.submitted += 1
            job = str(self.submitted)
            text = Path(words[-1]).read_text()
            (self.names[job],) = re.findall(r"--job-name=(\S+)", text)
            self.reasons[job] = "JobHeldUser" if "--hold" in words else "Dependency"
            return job
        if words[:2] == ("scontrol", "release"):
            self.reasons[words[2]] = "Priority"
        return ""


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Queue:
    made = Queue()
    monkeypatch.setattr(queue, "command", made)
    monkeypatch.setattr(chain, "take_snapshot", lambda run: tmp_path / "code")
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), run, Selection(), "loopback")
    return run


@pytest.mark.parametrize(
    "reason", ["JobHeldUser", "launch failed requeued held", "job requeued in held state"]
)
def test_what_a_crashed_controller_or_a_person_held_is_released(
    reason: str, slurm: Queue, run: RunFolder
) -> None:
    first = chain.send(run, ["init", "stage0"])
    assert slurm.reasons == {"1": "Priority", "2": "Dependency"}
    slurm.reasons["1"] = reason
    again = chain.send(run, ["init", "stage0"])
    assert again.kept == first.new
    assert again.new == {}
    assert slurm.submitted == 2
    assert slurm.reasons["1"] == "Priority"
    released = [event["job"] for event in run.journal.read() if event["event"] == "released"]
    assert released == ["1", "1"]


def test_what_an_administrator_holds_is_named_and_left_alone(slurm: Queue, run: RunFolder) -> None:
    chain.send(run, ["init", "stage0"])
    slurm.reasons["1"] = "JobHeldAdmin"
    again = chain.send(run, ["init", "stage0"])
    assert again.stuck == {"init": "1"}
    assert slurm.reasons["1"] == "JobHeldAdmin"


@pytest.mark.parametrize("reason", ["Priority", "Resources", "Dependency", "BeginTime"])
def test_what_waits_its_turn_is_left_alone(reason: str, slurm: Queue, run: RunFolder) -> None:
    chain.send(run, ["init", "stage0"])
    slurm.reasons["1"] = reason
    chain.send(run, ["init", "stage0"])
    assert slurm.reasons["1"] == reason


def test_a_full_disk_at_submission_is_one_message_and_leaves_nothing_half_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(queue, "command", Queue())
    monkeypatch.setattr(submit, "check_data", lambda *_: None)
    written: list[int] = []

    def write(path: Path, content: bytes) -> None:
        written.append(1)
        if len(written) > 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # as a full disk does
        path.touch()

    recipe = write_recipe(tmp_path / "recipe")
    words = ["submit", str(recipe), "--site", "loopback", "--run", str(tmp_path / "run")]
    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", write)
        assert main(words) == exit_codes.USAGE
    said = capsys.readouterr().err
    assert f"{tmp_path / 'run'}: No space left on device; make room" in said
    assert "Traceback" not in said
    assert not list((tmp_path / "run" / "code").iterdir())
    assert main(words) == exit_codes.OK
    assert "init: job 1" in capsys.readouterr().out
