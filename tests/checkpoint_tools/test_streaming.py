"""Conversions that are cut off, repeated, watched, and that stay small."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed

from checkpoint_tools.diff import diff
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import explain
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.planned_file import FilePlan, PlannedFile
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.streaming import Progress, Task, plan_shards
from checkpoint_tools.workspace import Workspace
from tests.checkpoint_tools.conftest import SHARD_BYTES, Published, quiet
from tests.checkpoint_tools.published import read_all
from tests.conftest import REPOSITORY

FP32 = ExportOptions("fp32", SHARD_BYTES)


class Stopped(Exception):
    """Stands for a kill."""


def stop_after(count: int) -> Callable[[Progress], None]:
    """Raise once so many files are done."""
    files: list[str] = []

    def report(progress: Progress) -> None:
        files.append(progress.file)
        if len(set(files)) == count:
            raise Stopped

    return report


def cut_off(stage: Path, out: Path, count: int) -> Path:
    """An export that ended after `count` shards; its unfinished folder."""
    with pytest.raises(Stopped):
        export(stage, out, FP32, stop_after(count))
    assert not out.exists()
    return out.with_name(out.name + ".partial")


def finished(partial: Path) -> list[str]:
    """Files that the next attempt goes on from."""
    return list(json.loads((partial / "progress.json").read_text())["finished"])


def same_shards(one: Path, other: Path) -> bool:
    files = sorted(path.name for path in one.glob("*.safetensors"))
    assert files == sorted(path.name for path in other.glob("*.safetensors"))
    return all((one / file).read_bytes() == (other / file).read_bytes() for file in files)


def test_finished_shards_are_kept(
    stage_folder: Path, release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    partial = cut_off(stage_folder, tmp_path / "out", 3)
    kept = finished(partial)
    assert len(kept) == 3
    opened: list[str] = []
    original = PlannedFile.__init__

    def watch(self: PlannedFile, path: Path, plan: FilePlan) -> None:
        opened.append(path.name)
        original(self, path, plan)

    monkeypatch.setattr(PlannedFile, "__init__", watch)
    export(stage_folder, tmp_path / "out", FP32, quiet)
    assert opened
    assert not set(opened) & set(kept)
    assert same_shards(tmp_path / "out", release)
    assert not partial.exists()


def test_a_finished_shard_that_was_damaged_is_written_again(
    stage_folder: Path, release: Path, tmp_path: Path
) -> None:
    partial = cut_off(stage_folder, tmp_path / "out", 2)
    path = sorted(partial.glob("*.safetensors"))[0]
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(bytes(data))
    export(stage_folder, tmp_path / "out", FP32, quiet)
    assert same_shards(tmp_path / "out", release)


def test_another_source_starts_anew(stage_folder: Path, release: Path, tmp_path: Path) -> None:
    """Shards of other options or of a checkpoint that changed are not taken over."""
    stage = tmp_path / "stage"
    shutil.copytree(stage_folder, stage)
    partial = cut_off(stage, tmp_path / "out", 2)
    first = sorted(partial.glob("*.safetensors"))[0].stat()
    (stage / "checkpoints" / "step_000000" / "__0_0.distcp").touch()
    export(stage, tmp_path / "out", FP32, quiet)
    second = sorted((tmp_path / "out").glob("*.safetensors"))[0].stat()
    assert second.st_mtime_ns > first.st_mtime_ns
    assert same_shards(tmp_path / "out", release)


def test_an_import_goes_on_too(
    published: Published, stage_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("checkpoint_tools.stage_folder.FILE_BYTES", SHARD_BYTES)
    out = tmp_path / "stage"
    with pytest.raises(Stopped):
        import_folder(published.folder, out, None, 1, stop_after(3))
    partial = out.with_name("stage.partial")
    checkpoint = Path("checkpoints") / "step_000000"
    before = {name: (partial / checkpoint / name).stat().st_mtime_ns for name in finished(partial)}
    assert len(before) == 3
    import_folder(published.folder, out, None, 1, quiet)
    after = {path.name: path.stat().st_mtime_ns for path in out.rglob("*.distcp")}
    assert {name: after[name] for name in before} == before
    export(out, tmp_path / "again", FP32, quiet)
    back = read_all(tmp_path / "again")
    assert all(back[name].equal(tensor) for name, tensor in published.tensors.items())


def test_a_result_is_never_replaced(release: Path, stage_folder: Path) -> None:
    with pytest.raises(ConversionError, match="exists already"):
        export(stage_folder, release, FP32, quiet)


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        Workspace(tmp_path / "out", {}),
        pytest.raises(ConversionError, match="written by another process"),
        Workspace(tmp_path / "out", {}),
    ):
        pass


def test_progress_says_how_fast(stage_folder: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    export(stage_folder, tmp_path / "out", FP32, lambda progress: lines.append(str(progress)))
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    assert len(lines) >= shards
    assert all("GB/s" in line and re.search(r" of \d[\d.]* [kM]B,", line) for line in lines)


def test_shards_are_filled_in_order() -> None:
    def task(name: str, size: int) -> Task:
        return Task((), {name: TensorSpec(torch.uint8, (size,))}, list)

    tasks = [task("a", 4), task("b", 3), task("c", 20), task("d", 6), task("e", 4)]
    shards = plan_shards(tasks, 10, lambda number, count: f"{number}/{count}")
    assert [(s.file, list(s.specs)) for s in shards] == [
        ("0/3", ["a", "b"]),
        ("1/3", ["c"]),
        ("2/3", ["d", "e"]),
    ]


PEAK = """
import json, os, sys, threading
from pathlib import Path
import torch
from checkpoint_tools import streaming
from checkpoint_tools.safetensors_file import TensorSpec, plan_file
from checkpoint_tools.streaming import Stream, Task, plan_shards
from checkpoint_tools.workspace import Workspace

# Above malloc's largest threshold for giving memory back at once.
ROWS, COUNT = 33 << 20, 8
os.fsync = lambda descriptor: None
streaming.FREE_BYTES = 0

def anonymous():
    for line in open("/proc/self/status"):
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def read(name):
    return torch.full((ROWS,), int(name), dtype=torch.uint8)

tasks = [
    Task((str(i),), {str(i): TensorSpec(torch.uint8, (ROWS,))}, lambda t: [t[0] + 1], ROWS)
    for i in range(COUNT)
]
peak, stop = [0], threading.Event()
def sample():
    while not stop.wait(0.002):
        peak[0] = max(peak[0], anonymous())
before = anonymous()
sampler = threading.Thread(target=sample)
sampler.start()
with Workspace(Path(sys.argv[1]), {}) as workspace:
    stream = Stream(read, workspace, workspace.path, plan_file, lambda progress: None)
    stream.run(plan_shards(tasks, 5 * ROWS, lambda number, count: f"{number}.safetensors"))
stop.set()
sampler.join()
print(json.dumps({"peak": peak[0] - before, "tensor": ROWS, "all": ROWS * COUNT}))
"""


def test_memory_is_bounded_by_the_largest_tensor(tmp_path: Path) -> None:
    """Eight equal tensors, each read and changed: three of them alive at most, and some slack."""
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "out")],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
        timeout=100,
    )
    found = json.loads(done.stdout)
    assert found["peak"] < 3.3 * found["tensor"] < found["all"]


def test_no_model_and_no_process_group(
    published: Published, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a conversion made a module or a process group")

    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    monkeypatch.setattr(torch.distributed, "init_process_group", refuse)
    import_folder(published.folder, tmp_path / "stage", None, 1, quiet)
    export(tmp_path / "stage", tmp_path / "out", FP32, quiet)
    assert explain(tmp_path / "stage", verify=True)["tensors"]["count"] > 50
    assert not any(change.relative for change in diff(tmp_path / "stage", tmp_path / "out").changes)
