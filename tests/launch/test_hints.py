"""What a refused or waiting job is told: what was asked, the nearest value the cluster takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.slurm import queue, watch
from launch.slurm.hints import explain_refusal, time_note
from launch.slurm.queue import SlurmError
from megatron_vl.run.folder import RunFolder

SCRIPT = """#!/bin/bash
#SBATCH --nodes=3
#SBATCH --ntasks-per-node=8
#SBATCH --time=300
#SBATCH --partition=bacth
#SBATCH --account="my team"
#SBATCH --exclude=n1,n7
#SBATCH --reservation=winter
#SBATCH --mem=9000G
"""
CLUSTER = {
    "sinfo -h -o %R": "batch\nhigh\nbatch",
    "sinfo -hN -o %N": "n1\nn2\nn17",
    "sinfo -h -o %R %l": "batch 4:00:00\nhigh infinite\nbacth 1-02:30:00",
    "sinfo -h -p bacth -o %D %T nodes of %c cores, %m MB and GPUs %G": (
        "4 drained nodes of 8 cores, 64000 MB and GPUs (null)"
    ),
    "scontrol show reservation -o": "ReservationName=winter25 StartTime=x\nReservationName=a B=c",
}


def ask(*words: str) -> str:
    """A cluster without accounting."""
    if words[0] == "sacctmgr":
        raise SlurmError("sacctmgr: no accounting")
    return CLUSTER[" ".join(words)]


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("invalid partition specified", "job.partition of the site is bacth; nearest valid: batch"),
        ("Invalid account", "job.account of the site is my team, and `sacctmgr"),
        ("Invalid node name specified", "job.exclude of the site is n7; nearest valid: n17"),
        ("Requested reservation is invalid", "is winter; nearest valid: winter25 (there are a, w"),
        (
            "Requested time limit is invalid",
            "is 300, the partition bacth gives 1590; nearest valid",
        ),
        ("Requested node configuration is not available", "--ntasks-per-node=8 --mem=9000G; there"),
        (
            "Requested node configuration is not available",
            "4 drained nodes of 8 cores, 64000 MB and GPUs none; of nodes",
        ),
        ("Zero Bytes were transmitted or received", ""),
    ],
)
def test_a_refusal_names_what_was_asked_and_the_nearest_valid(said: str, told: str) -> None:
    found = explain_refusal(said, SCRIPT, ask)
    assert told in found
    assert bool(told) == bool(found)


@pytest.mark.parametrize(
    ("partition", "noted"), [("batch", True), ("bacth", False), ("high", False)]
)
def test_a_job_that_would_never_start_is_noted(partition: str, noted: bool) -> None:
    note = time_note(SCRIPT.replace("--partition=bacth", f"--partition={partition}"), ask)
    assert bool(note) == noted
    if noted:
        assert "time.limit_minutes of the site is 300, the partition batch gives 240" in note


def test_the_queue_puts_it_behind_slurm_s_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "job.sh").write_text(SCRIPT)

    def command(*words: str) -> str:
        if words[0] == "sbatch":
            raise SlurmError(f"sbatch: invalid partition specified: bacth{queue.HINT}set it")
        return ask(*words)

    monkeypatch.setattr(queue, "command", command)
    with pytest.raises(SlurmError) as caught:
        queue.check_script(tmp_path / "job.sh")
    first, second = str(caught.value).split("\n")
    assert first == "sbatch: invalid partition specified: bacth"
    assert second == (
        "what to change: job.partition of the site is bacth; nearest valid: batch "
        "(there are batch, high)"
    )


def test_a_machine_without_slurm_conf_is_told_where_to_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "squeue"
    program.write_text(
        "#!/bin/sh\necho 'fatal: Could not establish a configuration source' >&2\nexit 1\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    with pytest.raises(SlurmError, match=r"what to change: no slurm\.conf here: use a login node"):
        queue.command("squeue", "-h")


@pytest.mark.parametrize(
    ("reason", "words"),
    [
        ("QOSMaxJobsPerUserLimit", "at a limit of the QOS"),
        ("AssocGrpCpuLimit", "at a limit of the account"),
        ("PartitionTimeLimit", "lower time.limit_minutes of the site"),
        ("ReqNodeNotAvail, UnavailableNodes:n3", "`sinfo -R` says why (ReqNodeNotAvail, Unavail"),
        ("DependencyNeverSatisfied", "did not end well"),
        ("Dependency", "waits for the stage before it"),
        ("SomethingNew", "waits: SomethingNew"),
        ("None", "has not looked at it yet"),
    ],
)
def test_why_a_job_waits_is_said_with_what_to_do(
    reason: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path)
    run.create(
        {"stages": [{"name": "init", "folder": "00_init"}], "created": "2026-01-01T00:00:00"}
    )
    row = f"7|{queue.job_name(run.path, 'init')}|PENDING|{reason}|1:00|N/A"
    monkeypatch.setattr(queue, "slurm_is_here", lambda: True)
    monkeypatch.setattr(queue, "command", lambda *words: row)
    seen = watch.views(run)
    assert seen is not None
    assert words in seen["init"].note


def test_watching_that_is_stopped_says_that_the_jobs_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "my run")
    run.create({"stages": [{"name": "init", "folder": "00_init"}]})

    def interrupted(run: RunFolder, watcher: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "_follow", interrupted)
    monkeypatch.setattr(watch, "PlainWatcher", _watcher)
    assert watch.follow(run, ["init"]) == 0
    said = capsys.readouterr().out
    assert "the jobs go on" in said
    assert f"stop them: mvl cancel '{run.path}'" in said


@contextmanager
def _watcher(run: RunFolder) -> Iterator[Callable[[], None]]:
    yield lambda: None
