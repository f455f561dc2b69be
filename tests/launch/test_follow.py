"""What a person sees while a run works: all of it, soon, and nothing twice."""

import time
from pathlib import Path
from typing import Any

import pytest

from launch.follow import LiveWatcher, PlainWatcher
from launch.graph import Selection
from launch.submission import prepare
from launch.summary import duration, first_to_last, print_summary
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import append_metrics
from tests.launch.small_recipe import write_recipe
from tests.launch.test_chain import supervise


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe", steps=20), folder, Selection(), "local")
    return folder


def step(stage: StageFolder, number: int, **more: Any) -> None:
    line = {"step": number, "loss": 8.0 / number, "lr": 1e-3, "grad_norm": 1.0, "tokens": 512}
    line |= {"samples": 8, "tokens_per_s": 100.0, "tflops": 0.1, "mfu": None, "hfu": None}
    line |= {"seconds": 3.0, "data_wait_s": 0.0, "save_stall_s": 0.0, "bubble": None}
    append_metrics(stage.metrics_path, line | more)


def talk(stage: StageFolder, text: str) -> None:
    with (stage.attempt_path(stage.last_attempt()) / "rank_0.log").open("a") as log:
        log.write(text + "\n")


def look(watcher: PlainWatcher | LiveWatcher, stage: StageFolder) -> None:
    watcher._next_look = 0.0
    watcher.tick(stage)


def test_words_measurements_and_what_is_left(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, watcher = run.stage("init"), PlainWatcher(run)
    watcher.begin(stage, stage.start_attempt())
    talk(stage, "some library: a warning\n[init] starts from weights drawn with seed 1")
    append_metrics(stage.metrics_path, {"eval": "val", "step": 0, "loss": 7.5})
    step(stage, 1)
    look(watcher, stage)
    talk(stage, "[init] step 2/20 which the metrics tell too")
    step(stage, 2)
    append_metrics(stage.metrics_path, {"drift": {}, "step": 2, "keep": "decoder.1"})
    step(stage, 3)
    look(watcher, stage)
    assert capsys.readouterr().out.splitlines() == [
        "init: starts from weights drawn with seed 1",
        "init: step 0/20  held-out loss 7.5000 (val)",
        "init: step 1/20  loss 8.0000  lr 1.00e-03  100 tokens/s  57 s left",
    ]
    step(stage, 20)
    look(watcher, stage)
    assert "step 20/20" in capsys.readouterr().out


def test_the_last_lines_are_shown_though_the_ranks_have_ended(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    supervise(run)
    stage, watcher = run.stage("init"), PlainWatcher(run)
    receipt = stage.receipt()
    assert receipt is not None
    watcher.begin(stage, 1)
    append_metrics(stage.metrics_path, {"eval": "val", "step": 20, "loss": 1.5})
    watcher.end(stage, receipt)
    out = capsys.readouterr().out
    assert "held-out loss 1.5000" in out
    assert "step 1/20" not in out  # of an earlier attempt


def test_silence_is_broken(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, watcher = run.stage("init"), PlainWatcher(run)
    watcher.begin(stage, stage.start_attempt())
    clock = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: clock + 6)
    watcher.tick(stage)
    assert capsys.readouterr().out == ("init: starting: loading its packages (6 s so far)\n")
    step(stage, 4)
    monkeypatch.setattr(time, "monotonic", lambda: clock + 7)
    watcher.tick(stage)
    monkeypatch.setattr(time, "monotonic", lambda: clock + 20)
    watcher.tick(stage)
    assert "init: works on step 5/20 (20 s so far)" in capsys.readouterr().out


def test_the_live_bars_follow_the_stage(run: RunFolder) -> None:
    stage, watcher = run.stage("init"), LiveWatcher(run)
    watcher.begin(stage, stage.start_attempt())
    look(watcher, stage)
    task = watcher._progress.tasks[0]
    assert task.fields["text"].startswith("starting")
    step(stage, 5)
    look(watcher, stage)
    assert task.completed == 5
    assert task.fields["text"] == "loss 1.6000  45 s left  100 tokens/s"
    step(stage, 20)
    look(watcher, stage)
    assert task.fields["text"].startswith("all steps done")


def test_the_summary_has_a_line_a_stage(run: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    supervise(run, stage0="import sys; sys.exit(1)")
    print_summary(run, ["init", "stage0"])
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.split()[:6] == ["init", "done", "20/20", "5.0000", "->", "0.2500"] for line in lines
    )
    assert any(line.split()[:3] == ["stage0", "failed", "0/20"] for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_lengths_and_losses_in_words() -> None:
    assert [duration(s) for s in (None, 0.4, 59.4, 95, 7260)] == [
        "",
        "0 s",
        "59 s",
        "1 min 35 s",
        "2 h 1 min",
    ]
    assert first_to_last([]) == ""
    assert first_to_last([{"loss": 2.0}]) == "2.0000"
