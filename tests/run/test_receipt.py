"""Receipts: written whole or not at all, read strictly or not at all."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.run import atomic
from megatron_vl.run.receipt import (
    CheckpointRef,
    ParentRef,
    Receipt,
    ReceiptError,
    Seconds,
    now,
    read_receipt,
    write_receipt,
)

CONTRACT = {
    "schema", "run", "stage", "status", "reason", "step", "attempts", "checkpoint", "parent",
    "config_hash", "data_cursor", "trainable", "metrics", "gate", "seconds", "versions", "started",
    "ended", "kind", "inputs", "outputs",
}  # fmt: skip


def make(**changes: Any) -> Receipt:
    receipt = Receipt(
        run="demo",
        stage="stage0",
        status="done",
        reason="all 30 steps taken",
        step=30,
        attempts=1,
        checkpoint=CheckpointRef("checkpoints/step_30", "ab" * 32),
        parent=ParentRef("init", "cd" * 32),
        config_hash="0123456789ab",
        data_cursor=240,
        trainable=["projector"],
        started=now(),
        ended=now(),
        metrics={"loss": 2.5},
        seconds=Seconds(useful=10.0, lost=0.5),
        versions={"torch": "2.13.0"},
    )
    return dataclasses.replace(receipt, **changes)


def test_round_trip_keeps_everything_and_the_file_contract(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(path, make())
    assert read_receipt(path) == make(
        started=read_receipt(path).started, ended=read_receipt(path).ended
    )
    assert set(json.loads(path.read_text())) == CONTRACT


def test_a_failed_receipt_needs_no_checkpoint_or_parent(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    failed = make(status="failed", checkpoint=None, parent=None, data_cursor=None)
    write_receipt(path, failed)
    assert read_receipt(path) == failed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2, this version reads 1"),
        ({"status": "finished"}, "expected one of done, incomplete, failed, held"),
        ({"step": "30"}, "step is '30', expected int"),
        ({"step": True}, "step is True, expected int"),
        ({"checkpoint": {"path": "x"}}, "missing checkpoint.digest"),
        ({"seconds": {"useful": 1, "lost": 1, "waiting": 1, "idle": 1}}, "unknown seconds.idle"),
        ({"trainable": "projector"}, "expected list"),
        ({"extra": 1}, "unknown extra"),
        ({"checkpoint": None}, "done, but checkpoint is null"),
        ({"parent": []}, "expected an object"),
    ],
)
def test_reading_is_strict(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(path, make())
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ReceiptError, match=message) as caught:
        read_receipt(path)
    assert str(path) in str(caught.value)


def test_missing_key_and_broken_json_are_named(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(path, make())
    value = json.loads(path.read_text())
    del value["config_hash"]
    path.write_text(json.dumps(value))
    with pytest.raises(ReceiptError, match="missing config_hash"):
        read_receipt(path)
    path.write_text('{"schema": 1, "run"')
    with pytest.raises(ReceiptError, match="not JSON"):
        read_receipt(path)


def test_a_receipt_that_could_not_be_read_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "receipt.json"
    with pytest.raises(ReceiptError, match="checkpoint is null"):
        write_receipt(path, make(checkpoint=None))
    with pytest.raises(ReceiptError, match="JSON values only"):
        write_receipt(path, make(metrics={"loss": float("nan")}))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_a_write_that_breaks_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    path = tmp_path / "receipt.json"
    write_receipt(path, make())
    before = path.read_bytes()

    def broken(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, where, broken)
    with pytest.raises(OSError, match="disk full"):
        write_receipt(path, make(step=31))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["receipt.json"]


def test_content_is_on_disk_before_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    atomic.write_text(tmp_path / "file", "text")
    assert calls == ["fsync", "replace", "fsync"]
