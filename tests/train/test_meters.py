"""Measurements: what they are made of, and that a stage writes them."""

import itertools
from pathlib import Path

import pytest

from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.flops import PackFlops, pack_flops
from megatron_vl.cost.recompute import NOTHING, Recomputed
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import append_metrics, eval_lines, read_metrics, step_lines
from megatron_vl.train import timers
from megatron_vl.train.meters import utilisation
from megatron_vl.train.timers import ScheduleTimers, bubble
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train.meter_jobs import compute_spans, two_steps
from tests.train.stage_jobs import run_stage

ALL = {"encoder", "projector", "decoder"}


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that a second passes on at every look."""
    ticks = itertools.count()
    monkeypatch.setattr(timers.time, "perf_counter", lambda: float(next(ticks)))


def test_a_bubble_is_the_schedule_without_compute_and_reductions(ticking: None) -> None:
    schedule = ScheduleTimers()
    schedule("forward-backward", log_level=1).start(barrier=True)
    for name in ("forward-compute", "forward-recv", "backward-compute", "forward-compute"):
        schedule(name, log_level=2).start()
        schedule(name).stop()
    schedule("all-grads-sync", log_level=1).start(barrier=True)
    schedule("all-grads-sync").stop()
    schedule("embedding-grads-all-reduce", log_level=1).start(barrier=False)
    schedule("embedding-grads-all-reduce").stop()
    schedule("forward-backward").stop()
    # Twelve looks at the clock: eleven seconds, three of compute, two of reductions.
    assert schedule.take() == (3.0, 9.0)
    assert schedule.take() == (0.0, 0.0)
    assert bubble(3.0, 9.0) == pytest.approx(2 / 3)


def test_a_restart_forgets(ticking: None) -> None:
    schedule = ScheduleTimers()
    for _ in range(2):
        schedule.restart()
        schedule("forward-backward").start()
        schedule("forward-backward").stop()
    assert schedule.take() == (0.0, 1.0)


@pytest.mark.distributed
@pytest.mark.parametrize("layout", [["parallel.pipeline=2"], []], ids=["PP2", "one-rank"])
def test_schedules_mark_every_micro_batch(ranks: RankPool, layout: list[str]) -> None:
    overrides = ["data.sequence_length=256", "parallel.data=1", *layout]
    found = ranks.run(2 if layout else 1, compute_spans, LAPTOP / "stage1.yaml", overrides, 3)
    for spans, compute, schedule in found:
        assert spans == {"forward-backward": 1, "forward-compute": 3, "backward-compute": 3}
        assert 0 < compute < schedule


def test_utilisation_needs_a_declared_peak() -> None:
    assert utilisation(200.0, 800.0) == 0.25
    assert utilisation(200.0, 0.0) is None


def flops(
    config: StageConfig, pack: Pack, length: int, recomputed: Recomputed = NOTHING
) -> PackFlops:
    return pack_flops(
        config.model,
        document_lengths=pack.document_lengths,
        padded_length=length,
        grids=pack.grids,
        trainable=ALL,
        recomputed=recomputed,
    )


def make_stage(path: Path, small_data: SmallData, *overrides: str) -> StageFolder:
    """A run folder of stage 1 alone: two steps on two pipeline ranks with recompute."""
    common = [
        small_data.override,
        "parallel.data=1",
        "parallel.pipeline=2",
        "recompute.decoder=2",
        "recompute.encoder=3",
        "data.sequence_length=256",
        "train.global_batch=2",
        "train.steps=2",
        "train.peak_tflops=0.05",
        "carry.weights=random",
        "evaluation.batches=1",
    ]
    config = load_stage(LAPTOP / "stage1.yaml", [*common, *overrides])
    run = RunFolder(path)
    run.create({"stages": [{"name": "stage1", "folder": "stage1"}]})
    (stage,) = run.stages()
    stage.config_path.write_text(to_yaml(config))
    return stage


@pytest.mark.distributed
def test_a_step_writes_what_it_measured(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    stage = make_stage(tmp_path, small_data)
    ranks.run(2, two_steps, tmp_path, "stage1", 1.5)
    first, second = read_metrics(stage.metrics_path)
    config = load_stage(stage.config_path)
    loader = PackLoader(config, split="train", rank=0, size=1, cursor=0)
    # Of each stage's four layers the first two: M- and -M of M-M* and -MM-.
    recomputed = Recomputed("M--M", encoder=3)
    for line in (first, second):
        packs = loader.next_batch()
        asked = sum(flops(config, pack, sum(pack.document_lengths)).total for pack in packs)
        run_in_all = sum(flops(config, pack, 256, recomputed).hardware for pack in packs)
        per_rank = line["seconds"] * 1e12 * 2
        assert line["tflops"] * per_rank == pytest.approx(asked)
        assert line["mfu"] == pytest.approx(line["tflops"] / 0.05)
        assert line["hfu"] * 0.05 * per_rank == pytest.approx(run_in_all)
        assert line["hfu"] > line["mfu"] > 0
        assert 0 <= line["data_wait_s"] < line["seconds"]
        assert 0 < line["bubble"] < 1
    loader.close()
    assert (first["save_stall_s"], second["save_stall_s"]) == (0, 1.5)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_stage_tells_its_saves_and_its_goodput(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    stage = make_stage(tmp_path, small_data, "checkpoint.every=1")
    ranks.run(2, run_stage, tmp_path, "stage1")
    records = read_metrics(stage.metrics_path)
    first, second = step_lines(records)
    assert first["save_stall_s"] == 0 < second["save_stall_s"]
    assert all(line["seconds"] > 0 for line in eval_lines(records))
    receipt = stage.receipt()
    assert receipt is not None
    assert 0 < receipt.metrics["goodput"] <= 1
    assert receipt.metrics["save_stall_s"] > second["save_stall_s"]


def test_undeclared_and_absent_measurements_are_null(tmp_path: Path) -> None:
    line = dict.fromkeys(
        ("loss", "lr", "grad_norm", "tokens", "samples", "tokens_per_s", "tflops", "seconds"), 1.0
    )
    line |= {"step": 1, "data_wait_s": 0.0, "save_stall_s": 0.0}
    with pytest.raises(ValueError, match="missing mfu, hfu, bubble"):
        append_metrics(tmp_path / "metrics.jsonl", line)
    append_metrics(tmp_path / "metrics.jsonl", {**line, "mfu": None, "hfu": None, "bubble": None})
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["hfu"] is None
