"""Journal and metrics: lines that are only appended, by several writers and across crashes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.run.journal import Journal, wall_seconds
from megatron_vl.run.metrics import (
    append_metrics,
    eval_lines,
    read_metrics,
    set_lines,
    step_lines,
)


def step(number: int, loss: float = 1.0) -> dict[str, float]:
    return {
        "step": number,
        "loss": loss,
        "lr": 1e-3,
        "grad_norm": 0.5,
        "tokens": 100,
        "samples": 8,
        "tokens_per_s": 50.0,
        "tflops": 0.1,
        "mfu": 0.2,
        "hfu": 0.25,
        "seconds": 2.0,
        "data_wait_s": 0.5,
        "save_stall_s": 0.0,
        "bubble": 0.1,
    }


def test_wall_time_counts_every_attempt_that_ended() -> None:
    def event(name: str, attempt: int, second: int, stage: str = "init") -> dict[str, object]:
        time = f"2026-01-01T00:00:{second:02d}+00:00"
        return {"event": name, "stage": stage, "attempt": attempt, "time": time}

    events = [
        {"event": "planned", "stage": None, "attempt": None, "time": "2026-01-01T00:00:00+00:00"},
        event("started", 1, 1),
        event("ended", 1, 5),
        event("started", 2, 10),
        event("saved", 2, 15),
        event("ended", 2, 20),
        event("started", 1, 21, "stage0"),
    ]
    assert wall_seconds(events) == {"init": 14.0}


def test_journal_keeps_order_and_fields(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "run" / "journal.jsonl")
    assert journal.read() == []
    journal.append("started", stage="init", attempt=1, ranks=2)
    journal.append("ended", stage="init", attempt=1, job="77", status="done")
    first, second = journal.read()
    assert (first["event"], first["stage"], first["attempt"], first["ranks"]) == (
        "started",
        "init",
        1,
        2,
    )
    assert (second["job"], second["status"]) == ("77", "done")
    assert first["time"] <= second["time"]


def test_journal_refuses_an_unknown_event(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the journal knows planned"):
        Journal(tmp_path / "j").append("begun")


def test_journal_takes_the_slurm_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    journal = Journal(tmp_path / "j")
    journal.append("started")
    assert journal.read()[0]["job"] == "4711"


def test_journal_lines_of_several_processes_do_not_mix(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from megatron_vl.run.journal import Journal\n"
        "j = Journal(Path(sys.argv[1]))\n"
        "for i in range(200): j.append('saved', who=sys.argv[2], number=i, text='x' * 500)"
    )
    path = tmp_path / "j"
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in ("a", "b")
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    events = Journal(path).read()
    for name in ("a", "b"):
        assert [e["number"] for e in events if e["who"] == name] == list(range(200))


def test_a_cut_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, step(1))
    with path.open("a") as file:
        file.write('{"step": 2, "loss"')
    assert [line["step"] for line in read_metrics(path)] == [1]
    append_metrics(path, step(2))
    assert [line["step"] for line in read_metrics(path)] == [1, 2]


def test_the_last_line_for_a_step_counts(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number, loss in ((1, 3.0), (2, 2.0), (3, 1.5), (2, 2.5), (3, 2.25)):
        append_metrics(path, step(number, loss))
    assert [line["loss"] for line in read_metrics(path)] == [3.0, 2.5, 2.25]


def test_evaluations_stand_beside_steps(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, step(1))
    append_metrics(path, {"eval": "qa", "step": 1, "loss": 2.0})
    append_metrics(path, {"eval": "ocr", "step": 1, "loss": 3.0})
    records = read_metrics(path)
    assert len(step_lines(records)) == 1
    assert {line["eval"]: line["loss"] for line in set_lines(records)} == {"qa": 2.0, "ocr": 3.0}
    assert eval_lines(records) == []


def test_a_line_without_a_key_of_the_contract_is_refused(tmp_path: Path) -> None:
    record = step(1)
    del record["grad_norm"]
    with pytest.raises(ValueError, match="missing grad_norm"):
        append_metrics(tmp_path / "m", record)
    with pytest.raises(ValueError, match="missing loss"):
        append_metrics(tmp_path / "m", {"eval": "qa", "step": 1})


@given(loss=st.floats())
def test_every_digit_of_a_loss_survives(
    tmp_path_factory: pytest.TempPathFactory, loss: float
) -> None:
    path = tmp_path_factory.mktemp("m") / "metrics.jsonl"
    append_metrics(path, step(1, loss))
    found = read_metrics(path)[0]["loss"]
    assert found == loss or (math.isnan(found) and math.isnan(loss))
    json.loads(path.read_text(), parse_constant=pytest.fail)  # strict JSON: no bare NaN


def test_a_journal_whose_last_line_a_full_disk_cut_short_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command reads the journal: one cut line must not make the run unusable."""
    journal = Journal(tmp_path / "journal.jsonl")
    journal.append("started", stage="init", attempt=1)
    real = os.write
    monkeypatch.setattr(os, "write", lambda handle, text: real(handle, text[: len(text) // 2]))
    with pytest.raises(OSError, match="No space left on device"):
        journal.append("saved", stage="init", attempt=1, step=5)
    monkeypatch.undo()
    assert [event["event"] for event in journal.read()] == ["started"]
    journal.append("ended", stage="init", attempt=1, status="failed")
    assert [event["event"] for event in journal.read()] == ["started", "ended"]
