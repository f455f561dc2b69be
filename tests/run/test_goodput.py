"""Goodput by hand: useful seconds over all that passed since the first attempt began."""

from pathlib import Path

import pytest

from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.goodput import goodput
from megatron_vl.run.metrics import append_metrics
from megatron_vl.run.receipt import Receipt, write_receipt

AT = "2026-01-01T00:{:02d}:00+00:00"
STEP_KEYS = ("loss", "lr", "grad_norm", "tokens", "samples", "tokens_per_s", "tflops", "mfu", "hfu",
             "bubble", "save_stall_s")  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    run = RunFolder(tmp_path)
    run.create({"stages": [{"name": name, "folder": name} for name in ("init", "stage1")]})
    return run


def steps(stage: StageFolder, first: int, last: int, seconds: float, waited: float) -> None:
    for step in range(first, last + 1):
        line = dict.fromkeys(STEP_KEYS, 0.0) | {"step": step}
        append_metrics(stage.metrics_path, line | {"seconds": seconds, "data_wait_s": waited})


def journal(run: RunFolder, *starts: tuple[str, int, int]) -> None:
    """Write (stage, attempt, minute) as `started` events."""
    lines = [
        f'{{"time": "{AT.format(minute)}", "event": "started", "stage": "{stage}", '
        f'"attempt": {attempt}}}\n'
        for stage, attempt, minute in starts
    ]
    run.journal.path.write_text("".join(lines))


def test_steps_done_twice_count_once(run: RunFolder) -> None:
    """Attempt 1 ran 8 steps of 10 s and saved after 5; attempt 2 went on from there to 10."""
    journal(run, ("init", 1, 0), ("stage1", 1, 10), ("stage1", 2, 20))
    stage = run.stage("stage1")
    steps(stage, 1, 8, seconds=10.0, waited=1.0)
    steps(stage, 6, 10, seconds=12.0, waited=0.0)
    append_metrics(stage.metrics_path, {"eval": "val", "step": 10, "loss": 1.0, "seconds": 15.0})
    useful = 5 * 9 + 5 * 12 + 15
    found = goodput(run, stage, AT.format(20), AT.format(25))
    assert found == pytest.approx(useful / (15 * 60))
    # The wall goes on while nothing is useful.
    assert goodput(run, stage, AT.format(20), AT.format(40)) == pytest.approx(useful / (30 * 60))


def test_receipts_of_attempts_tell_a_start_that_the_journal_lacks(run: RunFolder) -> None:
    stage = run.stage("stage1")
    for attempt in (1, 2):
        stage.attempt_path(attempt).mkdir(parents=True)
    write_receipt(
        stage.attempt_path(1) / "receipt.json",
        Receipt(
            run="r", stage="stage1", status="incomplete", reason="asked to stop", step=2,
            attempts=1, checkpoint=None, parent=None, config_hash="", data_cursor=None,
            trainable=[], started=AT.format(1), ended=AT.format(2),
        ),
    )  # fmt: skip
    steps(stage, 1, 3, seconds=20.0, waited=0.0)
    assert goodput(run, stage, AT.format(4), AT.format(5)) == pytest.approx(60 / 240)


def test_a_stage_without_steps_and_one_shorter_than_its_clock(run: RunFolder) -> None:
    stage = run.stage("init")
    assert goodput(run, stage, AT.format(0), AT.format(1)) == 0
    steps(stage, 1, 1, seconds=0.4, waited=0.1)
    assert goodput(run, stage, AT.format(0), AT.format(0)) == 1
