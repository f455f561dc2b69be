"""The drift meter names the layer FP8 hurts, the same at every layout, and disturbs nothing."""

from pathlib import Path

import pytest

from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import drift_lines, eval_lines, read_metrics, step_lines
from megatron_vl.train.build import Trainee
from megatron_vl.train.drift import DriftReport
from tests.conftest import DRAWN, LAPTOP, TINY, SmallData
from tests.support.ranks import RankPool
from tests.train import fp8_jobs
from tests.train.stage_jobs import run_stage

pytestmark = pytest.mark.distributed

STAGE1 = LAPTOP / "stage1.yaml"
EVERY = ["fp8.drift_every=1"]


def loud_channel(trainee: Trainee) -> None:
    """One channel into decoder.3's attention 300 000 times as large, its weights as much smaller:
    the same layer in BF16, to rounding."""
    for layer in trainee.module.language_model.decoder.layers:
        if layer.layer_number == 4:
            linear = layer.self_attention.linear_qkv
            linear.layer_norm_weight.data[5] *= 3e5
            linear.weight.data[:, 5] /= 3e5


def report(
    ranks: RankPool, data: SmallData, overrides: list[str], **options: object
) -> DriftReport:
    every = [data.override, *TINY, *EVERY, *overrides]
    (watched,) = ranks.run(1, fp8_jobs.run, options, STAGE1, every, 1)
    (found,) = watched.reports
    return found


@pytest.mark.parametrize("recipe", ["fp8_tensorwise", "fp8_blockwise"])
def test_an_outlier_channel_is_named(ranks: RankPool, small_data: SmallData, recipe: str) -> None:
    overrides = [f"precision={recipe}"]
    plain = report(ranks, small_data, overrides)
    loud = report(ranks, small_data, overrides, change=loud_channel)
    assert loud.keep == "decoder.3"
    worst = loud.layers["decoder.3"]
    assert worst.linear == "self_attention.linear_qkv"
    assert worst.error > 0.2 > 4 * plain.layers["decoder.3"].error
    assert worst.flushed > 0.1 > 5 * plain.layers["decoder.3"].flushed
    assert worst.input_amax > 1e5
    assert "fp8.keep_bf16=[encoder.1,decoder.3]" in loud.spoken(["encoder.1"])


def test_what_it_says_to_write_helps(ranks: RankPool, small_data: SmallData) -> None:
    """Kept in BF16 the layer is not measured any more, and its neighbours are not to blame."""
    overrides = ["precision=fp8_tensorwise", "fp8.keep_bf16=[decoder.3]"]
    kept = report(ranks, small_data, overrides, change=loud_channel)
    assert "decoder.3" not in kept.layers
    assert max(layer.error for layer in kept.layers.values()) < 0.08


def test_layers_are_measured_each_for_itself(ranks: RankPool, small_data: SmallData) -> None:
    found = report(ranks, small_data, ["precision=fp8_blockwise"])
    decoder, encoder = (f"decoder.{n}" for n in range(1, 7)), ("encoder.1", "encoder.2")
    assert set(found.layers) == {*decoder, *encoder, "projector"}
    errors = [layer.error for layer in found.layers.values()]
    assert errors == sorted(errors, reverse=True)
    # Two operands rounded to 4 significant bits each: 2 to 4 per cent, wherever the layer stands.
    assert all(0.02 < error < 0.05 for error in errors)
    assert all(layer.input_amax > layer.weight_amax > 0 for layer in found.layers.values())


def test_a_stage_writes_and_says_it(ranks: RankPool, small_data: SmallData, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.create({"stages": [{"name": "init", "folder": "00_init"}]})
    (stage,) = run.stages()
    overrides = [*TINY, "train.steps=2", "precision=fp8_blockwise", "fp8.drift_every=2"]
    config = load_stage(DRAWN, [small_data.override, *overrides])
    stage.config_path.write_text(to_yaml(config))
    ranks.run(1, run_stage, tmp_path / "run", "init")
    records = read_metrics(stage.metrics_path)
    assert [line["step"] for line in step_lines(records)] == [1, 2]
    assert [line["step"] for line in eval_lines(records)] == [0, 2]
    (line,) = drift_lines(records)
    assert line["step"] == 2
    assert line["keep"] == max(line["drift"], key=lambda name: line["drift"][name]["error"])
    keys = {"error", "linear", "input_amax", "weight_amax", "flushed"}
    assert all(set(layer) == keys for layer in line["drift"].values())
