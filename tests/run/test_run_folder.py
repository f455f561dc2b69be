"""The run folder: its places, its attempts, and who may start from whom."""

from pathlib import Path

import pytest

from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import ParentError, RunError, RunFolder, require_done_parent
from megatron_vl.run.receipt import CheckpointRef, Receipt, Status, now


def make_run(path: Path, skipped: str = "") -> RunFolder:
    names = ["init", "stage0", "stage1"]
    entries = [
        {"name": name, "folder": f"{i:02d}_{name}", "skipped": name == skipped}
        for i, name in enumerate(names)
    ]
    run = RunFolder(path)
    run.create({"schema": 1, "stages": entries})
    return run


def finish(run: RunFolder, name: str, status: Status = "done") -> Path:
    stage = run.stage(name)
    folder = stage.checkpoints / "step_3"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"w" * 100)
    digest = checkpoint_digest(folder)
    stage.write_receipt(
        Receipt(
            run=run.name,
            stage=name,
            status=status,
            reason="a reason",
            step=3,
            attempts=1,
            checkpoint=CheckpointRef("checkpoints/step_3", digest),
            parent=None,
            config_hash="x",
            data_cursor=0,
            trainable=[],
            started=now(),
            ended=now(),
        )
    )
    return folder


def test_places_follow_the_contract(tmp_path: Path) -> None:
    run = make_run(tmp_path / "demo")
    stage = run.stage("stage0")
    root = tmp_path / "demo" / "stages" / "01_stage0"
    assert stage.path == root
    assert stage.config_path == root / "config.yaml"
    assert stage.metrics_path == root / "metrics.jsonl"
    assert stage.attempt_path(2) == root / "attempts" / "2"
    assert run.name == "demo"
    assert run.stage("01_stage0") == stage


def test_order_parent_and_skipped_stages(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert [stage.name for stage in run.stages()] == ["init", "stage0", "stage1"]
    assert run.parent(run.stage("init")) is None
    assert run.parent(run.stage("stage1")) == run.stage("stage0")
    run = make_run(tmp_path / "b", skipped="stage0")
    assert run.parent(run.stage("stage1")) == run.stage("init")
    with pytest.raises(RunError, match="its stages are init, stage1"):
        run.stage("stage0")


def test_a_folder_without_a_plan_is_no_run(tmp_path: Path) -> None:
    assert not RunFolder(tmp_path).exists()
    with pytest.raises(RunError, match=r"no plan\.yaml"):
        RunFolder(tmp_path).stages()


def test_while_an_attempt_runs_there_is_no_receipt(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    stage = run.stage("init")
    assert stage.start_attempt() == 1
    finish(run, "init", "failed")
    assert stage.start_attempt() == 2
    assert stage.receipt() is None
    assert (stage.attempt_path(1) / "receipt.json").exists()
    assert stage.last_attempt() == 2


def test_a_done_parent_with_its_checkpoint_is_accepted(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    finish(run, "init")
    receipt = require_done_parent(run, run.stage("stage0"))
    assert receipt.stage == "init"
    assert run.stage("init").checkpoint_path(receipt).is_dir()


@pytest.mark.parametrize("status", ["incomplete", "failed", "held"])
def test_a_parent_that_is_not_done_is_refused(tmp_path: Path, status: Status) -> None:
    run = make_run(tmp_path)
    finish(run, "init", status)
    with pytest.raises(ParentError, match=f"it is {status}: a reason"):
        require_done_parent(run, run.stage("stage0"))


def test_a_parent_without_receipt_and_a_first_stage_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    with pytest.raises(ParentError, match="no receipt; run it first: mvl submit") as refused:
        require_done_parent(run, run.stage("stage0"))
    assert f"mvl checkpoint import HF {run.stage('init').path} --like" in str(refused.value)
    with pytest.raises(ParentError, match="first stage"):
        require_done_parent(run, run.stage("init"))


def test_a_changed_checkpoint_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    checkpoint = finish(run, "init")
    (checkpoint / "weights").write_bytes(b"w" * 99 + b"x")
    with pytest.raises(ParentError, match="files have changed since"):
        require_done_parent(run, run.stage("stage0"))
    assert require_done_parent(run, run.stage("stage0"), digest=None).done
    (checkpoint / "weights").unlink()
    with pytest.raises(ParentError, match="no checkpoint here"):
        require_done_parent(run, run.stage("stage0"))


def test_digest_sees_names_sizes_places_and_bits(tmp_path: Path) -> None:
    def digest(files: dict[str, bytes]) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return checkpoint_digest(folder)

    base = digest({"a": b"12", "b": b"3"})
    assert digest({"b": b"3", "a": b"12"}) == base
    others = [
        {"a": b"1", "b": b"23"},
        {"a": b"12", "c": b"3"},
        {"a": b"12", "d/b": b"3"},
        {"a": b"12", "b": b"2"},
        {"a": b"12", "b": b"3", "c": b""},
    ]
    found = {digest(files) for files in others}
    assert len(found) == len(others)
    assert base not in found


def test_digest_reads_files_longer_than_a_block(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(5 << 20))
    first = checkpoint_digest(tmp_path)
    with (tmp_path / "x").open("r+b") as file:
        file.seek((5 << 20) - 1)
        file.write(b"\1")
    assert checkpoint_digest(tmp_path) != first
