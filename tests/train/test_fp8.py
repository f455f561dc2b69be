"""Training in FP8: at every layout, cut off and gone on with, and beside BF16."""

import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.data.prepare import prepare_laptop
from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train import fp8_jobs
from tests.train.fp8_jobs import Watched

pytestmark = pytest.mark.distributed

STAGE1 = LAPTOP / "stage1.yaml"
# Two short packs a step, pictures among them.
QUICK = ["parallel.data=1", "train.global_batch=2", "data.sequence_length=256"]
TP2_SP = ["parallel.tensor=2", "parallel.sequence=true"]
PP2 = ["parallel.pipeline=2"]
DP2 = ["parallel.data=2"]


def trained(
    ranks: RankPool, data: SmallData, overrides: list[str], num_steps: int, **options: object
) -> list[Watched]:
    size = 2 if any("=2" in override for override in overrides if "parallel" in override) else 1
    every = [data.override, *QUICK, *overrides]
    return ranks.run(size, fp8_jobs.run, options, STAGE1, every, num_steps)


def near(found: Tensor, expected: Tensor) -> bool:
    """Largest magnitudes of the same steps; that of a gradient moves most with rounding."""
    return torch.allclose(found, expected, rtol=0.3)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, small_data: SmallData) -> dict[str, Watched]:
    """Two steps of each recipe on one rank; how far FP8 drifts is measured in the second."""
    common = ["fp8.drift_every=2"]
    return {
        "bf16": trained(ranks, small_data, ["precision=bf16"], 2)[0],
        "fp8_blockwise": trained(ranks, small_data, [*common, "precision=fp8_blockwise"], 2)[0],
        "fp8_delayed": trained(ranks, small_data, [*common, "precision=fp8_delayed"], 2)[0],
    }


@pytest.mark.parametrize(
    ("recipe", "layout"),
    [("fp8_blockwise", TP2_SP), ("fp8_blockwise", PP2), ("fp8_delayed", DP2)],
    ids=["blockwise-TP2+SP", "blockwise-PP2", "delayed-DP2"],
)
def test_a_layout_trains_as_one_rank(
    ranks: RankPool,
    small_data: SmallData,
    alone: dict[str, Watched],
    recipe: str,
    layout: list[str],
) -> None:
    """The same layers in FP8 over the whole pipeline, losses to BF16 rounding, one history, and one
    drift report."""
    expected = alone[recipe]
    found = trained(ranks, small_data, [f"precision={recipe}", "fp8.drift_every=2", *layout], 2)
    places = [place for rank in found for place in rank.places]
    assert set(places) == set(expected.places)
    assert len(places) == len(expected.places) * (1 if layout is PP2 else 2)
    for rank in found:
        assert rank.losses == pytest.approx(expected.losses, rel=2e-3)
        assert rank.grad_norms == pytest.approx(expected.grad_norms, rel=3e-2)
        for place, history in rank.history.items():
            assert near(history, expected.history[place]), place
            assert torch.equal(history, found[0].history[place]), place
        assert rank.reports == found[0].reports
        ((theirs,), (ours,)) = expected.reports, rank.reports
        assert ours.layers.keys() == theirs.layers.keys()
        for name, layer in ours.layers.items():
            other = theirs.layers[name]
            assert layer.error == pytest.approx(other.error, rel=0.1), name
            if layer.linear == other.linear:
                assert layer.weight_amax == pytest.approx(other.weight_amax, rel=0.02), name
                assert layer.flushed == pytest.approx(other.flushed, abs=0.01), name


def test_recipes_differ_from_bf16_and_from_each_other(alone: dict[str, Watched]) -> None:
    assert len({tuple(watched.losses) for watched in alone.values()}) == 3
    for watched in alone.values():
        assert watched.losses == pytest.approx(alone["bf16"].losses, rel=0.01)
    assert not alone["bf16"].places


def test_delayed_scaling_goes_on_bit_for_bit(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Three steps, against two, a save, and one more; and what a lost history would have done."""
    delayed = ["precision=fp8_delayed", "fp8.amax_history=4"]
    cut = tmp_path / "step_000002"
    whole = trained(ranks, small_data, delayed, 3)[0]
    trained(ranks, small_data, delayed, 2, folder=cut)
    resumed = trained(ranks, small_data, delayed, 1, source=cut)[0]
    assert resumed.losses == whole.losses[2:]
    assert resumed.grad_norms == whole.grad_norms[2:]
    assert resumed.digest == whole.digest
    for place, history in whole.history.items():
        assert torch.equal(resumed.history[place], history), place
        assert (history > 0).tolist() == [[True] * 3] * 3 + [[False] * 3]
    stored = full_tensors(cut, optimizer=True)
    for place, history in whole.history.items():
        assert torch.equal(stored[f"fp8.amax_history.{place}"][:2], history[1:3]), place
    assert not any(name.startswith("fp8.") for name in full_tensors(cut))
    # A window of another length has no use for this history and starts anew: not the same bits.
    forgot = trained(ranks, small_data, [delayed[0], "fp8.amax_history=5"], 1, source=cut)[0]
    assert forgot.digest != whole.digest
    # Two tensor ranks take theirs from one.
    for rank in trained(ranks, small_data, [*delayed, *TP2_SP], 1, source=cut):
        for place, history in rank.history.items():
            assert torch.equal(history[1:], whole.history[place][1:]), place


def test_recompute_and_measuring_change_no_bit(
    ranks: RankPool, small_data: SmallData, alone: dict[str, Watched]
) -> None:
    recompute = ["recompute.decoder=8", "recompute.encoder=4"]
    found = trained(ranks, small_data, ["precision=fp8_delayed", *recompute], 2)[0]
    expected = alone["fp8_delayed"]
    assert (found.losses, found.grad_norms) == (expected.losses, expected.grad_norms)
    assert found.digest == expected.digest
    for place, history in expected.history.items():
        assert torch.equal(found.history[place], history), place
    assert [len(watched.reports) for watched in (found, expected)] == [0, 1]


START, LONG, LAST = 60, 200, 50
# A rate of its own: the recipe's is tuned for other weights, and drawn ones learn nothing at it.
COURSE = [f"train.steps={START + LONG}", "optimizer.lr=2.0e-3"]


@pytest.fixture(scope="module")
def more_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Enough samples that few are seen twice."""
    root = tmp_path_factory.mktemp("more") / "laptop"
    config = load_stage(STAGE1, [f"data.root={root}"])
    sizes = dict.fromkeys(("captions", "ocr", "qa", "code", "text"), 500) | {"long_text": 60}
    prepare_laptop(config.data, config.model, seed=11, sizes=sizes, progress=lambda line: None)
    return SmallData(root)


@pytest.fixture(scope="module")
def start(ranks: RankPool, more_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Past the first fall of the loss. From drawn weights, or on samples seen many times, runs part
    whatever the rounding: float32 and BF16 end 1 % apart themselves."""
    folder = tmp_path_factory.mktemp("start") / f"step_{START:06d}"
    trained(ranks, more_data, [*COURSE, "precision=bf16"], START, folder=folder)
    return folder


def last_losses(
    ranks: RankPool, data: SmallData, start: Path, precision: str
) -> tuple[float, float]:
    """Mean losses of the first and the last 50 of 200 steps."""
    overrides = [*COURSE, f"precision={precision}"]
    (watched,) = trained(ranks, data, overrides, LONG, source=start)
    return statistics.fmean(watched.losses[:LAST]), statistics.fmean(watched.losses[-LAST:])


@pytest.fixture(scope="module")
def in_bf16(ranks: RankPool, more_data: SmallData, start: Path) -> tuple[float, float]:
    return last_losses(ranks, more_data, start, "bf16")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp8_tensorwise", "fp8_blockwise", "fp8_delayed"])
def test_200_steps_learn_as_bf16_does(
    ranks: RankPool,
    more_data: SmallData,
    start: Path,
    in_bf16: tuple[float, float],
    precision: str,
) -> None:
    """The same data from the same start: mean loss of the last 50 steps within 1 %."""
    first, last = last_losses(ranks, more_data, start, precision)
    print(f"{precision}: {first:.5f} to {last:.5f}, bf16: {in_bf16[0]:.5f} to {in_bf16[1]:.5f}")
    assert (first, last) != in_bf16
    assert in_bf16[1] < 0.98 * in_bf16[0]
    assert last < 0.98 * first
    assert last == pytest.approx(in_bf16[1], rel=0.01)
