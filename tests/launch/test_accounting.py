"""Hours: useful, lost and in the queue, told by the journal and the steps."""

from pathlib import Path
from typing import Any

import pytest

from launch.accounting import print_hours, stage_hours
from launch.graph import Selection
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import STEP_KEYS, append_metrics
from megatron_vl.run.receipt import Receipt, Seconds
from tests.launch.small_recipe import write_recipe

HOUR = "2026-01-01T{:02d}:{:02d}:00+00:00"


def at(minutes: int) -> str:
    return HOUR.format(minutes // 60, minutes % 60)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """init waits 5 min, is lost after 10, waits 20, takes 30; stage0 waits 2 and takes 40."""
    run = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), run, Selection(), "local")
    run.journal.path.unlink()

    def tell(minutes: int, event: str, stage: str | None, **more: Any) -> None:
        monkeypatch.setattr("megatron_vl.run.journal.now", lambda: at(minutes))
        run.journal.append(event, stage=stage, **more)

    tell(0, "submitted", "init")
    tell(0, "submitted", "stage0")
    tell(5, "started", "init", attempt=1, ranks=4)
    tell(15, "ended", "init", attempt=1)
    tell(35, "started", "init", attempt=2, ranks=4)
    tell(65, "ended", "init", attempt=2)
    tell(67, "started", "stage0", attempt=1, ranks=8)
    tell(107, "ended", "stage0", attempt=1)
    for step, seconds in ((1, 600.0), (2, 780.0)):
        line = dict.fromkeys(STEP_KEYS, 1.0) | {"step": step, "seconds": seconds}
        append_metrics(run.stage("init").metrics_path, line | {"data_wait_s": 30.0})
    return run


def test_hours_are_useful_lost_and_in_the_queue(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    init, stage0 = stage_hours(run)
    assert (init.stage, init.ranks, init.attempts) == ("init", 4, 2)
    assert init.waiting == (5 + 20) * 60
    assert init.useful == 600 + 780 - 2 * 30
    assert init.useful + init.lost == (10 + 30) * 60
    assert (stage0.waiting, stage0.useful, stage0.lost) == (120, 0, 2400)
    print_hours([init, stage0])
    said = capsys.readouterr().out
    assert "1,320 s" in said
    assert "2.67" in said  # 4 ranks for 40 minutes


def test_a_run_that_has_not_started_has_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), run, Selection(), "local")
    print_hours(stage_hours(run))
    assert capsys.readouterr().out == ""


def test_a_node_is_useful_by_what_its_receipt_states(run: RunFolder) -> None:
    """It takes no steps, so no line of metrics tells."""
    run.stage("stage0").write_receipt(
        Receipt(
            run=run.name,
            stage="stage0",
            status="done",
            reason="measured 2 metrics of init",
            step=0,
            attempts=1,
            checkpoint=None,
            parent=None,
            config_hash="0" * 64,
            data_cursor=None,
            trainable=[],
            started=at(67),
            ended=at(107),
            seconds=Seconds(useful=2000.0),
            kind="evaluate",
        )
    )
    node = stage_hours(run)[1]
    assert (node.useful, node.lost) == (2000.0, 400.0)
