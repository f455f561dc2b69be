"""Conversions that are stopped anywhere and go on end in the bytes of one that was not."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from megatron_vl.data.convert import job, native, run, writer
from megatron_vl.data.convert.run import FirstFault, Request, convert
from tests.conftest import REPOSITORY
from tests.data.convert.replicas import Replica, build

ROWS = 240


def contents(folder: Path) -> dict[str, str]:
    """Digests of every file, links by what they point to."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def request(replica: Replica, out: Path, **changes: object) -> Request:
    """A conversion into many small shards."""
    base = Request(
        replica.format, replica.source, out, replica.media_root,
        shard_size=40_000, held_out=0.2, strict=False,
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module", autouse=True)
def small_native_tasks() -> Iterator[None]:
    """Rows without copies are cut into tasks by their number alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "_MOST_ROWS", 40)
        yield


@pytest.fixture(scope="module", params=["messages", "nemotron-v1", "nemotron-v2", "hf-parquet"])
def replica(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Replica:
    return build(request.param, tmp_path_factory.mktemp("set"), ROWS)


@pytest.fixture(scope="module")
def undisturbed(replica: Replica, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("whole") / "set"
    convert(request(replica, out))
    return contents(out)


class Killed(BaseException):
    """Stands for a kill inside the process: nothing catches it to go on."""


def die_at(patch: pytest.MonkeyPatch, module: object, name: str, at: int) -> None:
    """Let the at-th call of a function of a module be its last."""
    real = getattr(module, name)
    calls = 0

    def dying(*args: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls == at:
            raise Killed
        return real(*args, **options)

    patch.setattr(module, name, dying)


def test_interruptions_change_nothing(
    replica: Replica,
    undisturbed: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Stopped while it lists, at a row, at a report, in the last writing, one after the other."""
    out = tmp_path / "set"
    places: list[tuple[object, str, int]] = [
        (run, "find_rows", 1),
        (job, "write_text", 1),
        (writer, "advance", 7),
        (writer, "advance", 100),
        (native if replica.format == "nemotron-v2" else writer, "report_file", 1),
        (run, "write_findings", 1),
        (run, "publish", 1),
    ]
    if replica.format == "nemotron-v2":
        places[1:1] = [(native, "list_shards", 1), (native, "write_text", 1)]
        places += [(native, "identity_of", 1)]
    else:
        places[4:4] = [(writer.os, "replace", 1)]
        places += [(run, "write_index", 1)]
    for module, name, at in places:
        with monkeypatch.context() as patch:
            die_at(patch, module, name, at)
            with pytest.raises(Killed):
                convert(request(replica, out, resume=True))
        assert not (out / ".nv-meta").exists(), "it is no source before it is whole"
    convert(request(replica, out, resume=True))
    assert contents(out) == undisturbed


@pytest.mark.parametrize("replica", ["messages", "nemotron-v2"], indirect=True)
def test_workers_change_nothing(
    replica: Replica, undisturbed: dict[str, str], tmp_path: Path
) -> None:
    convert(request(replica, tmp_path / "set", workers=3))
    assert contents(tmp_path / "set") == undisturbed


@pytest.mark.parametrize("replica", ["messages"], indirect=True)
def test_kill_minus_nine(replica: Replica, undisturbed: dict[str, str], tmp_path: Path) -> None:
    """A real command, killed with its worker processes at work, then resumed by other workers."""
    out = tmp_path / "set"
    words = [
        "data", "convert", "--from", replica.format, str(replica.source), "--out", str(out),
        "--media-root", str(replica.media_root), "--shard-size", "40000", "--held-out", "0.2",
        "--skip-missing", "--resume", "--workers", "2",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words],
        env=environment, cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.glob(".convert/task-*.json")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stdout and process.stdout.read()
        time.sleep(0.002)
    workers = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=20)
    assert not alive, "workers end with their parent"
    assert not (out / ".nv-meta").exists()
    done = len(list(out.glob(".convert/task-*.json")))
    total = len(json.loads((out / ".convert/tasks.json").read_text()))
    assert 0 < done < total
    convert(request(replica, out, resume=True))
    assert contents(out) == undisturbed


def test_finished_tasks_are_not_done_again(
    replica: Replica, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "set"
    done: list[int] = []
    module, name = (native, "check_task") if replica.format == "nemotron-v2" else (run, "run_task")
    real = getattr(module, name)

    def counting(job: job.Job, task: job.Task, *, strict: bool) -> object:
        if len(done) == 2:
            raise Killed
        done.append(task.number)
        return real(job, task, strict=strict)

    monkeypatch.setattr(module, name, counting)
    with pytest.raises(Killed):
        convert(request(replica, out))
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.tar")}
    done.clear()
    with pytest.raises(Killed):
        convert(request(replica, out, resume=True))
    assert done == [2, 3]
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_a_finished_conversion_is_left_alone(replica: Replica, tmp_path: Path) -> None:
    out = tmp_path / "set"
    report = convert(request(replica, out))
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    assert convert(request(replica, out)) == report
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before
    with pytest.raises(ValueError, match="holds another conversion"):
        convert(request(replica, out, seed=2))


def test_what_resume_refuses(replica: Replica, tmp_path: Path) -> None:
    out = tmp_path / "set"
    with pytest.raises(FirstFault, match=r"row \d+.*\n.*--skip-missing --resume"):
        convert(request(replica, out, strict=True))
    with pytest.raises(ValueError, match="go on with --resume"):
        convert(request(replica, out))
    with pytest.raises(ValueError, match="begun with other options"):
        convert(request(replica, out, resume=True, fraction=0.5))
    with run._lock(out / ".convert"), pytest.raises(ValueError, match="another conversion is"):
        convert(request(replica, out, resume=True))
    convert(request(replica, out, resume=True))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    with pytest.raises(ValueError, match="files that no conversion made"):
        convert(request(replica, tmp_path / "full", resume=True))
    assert (tmp_path / "full" / "mine").read_text() == "mine"


def test_strict_names_the_first_fault(replica: Replica, tmp_path: Path) -> None:
    first = min(replica.faults)
    with pytest.raises(FirstFault, match=rf"row {first}\b.*{replica.faults[first]}"):
        convert(request(replica, tmp_path / "set", strict=True))
