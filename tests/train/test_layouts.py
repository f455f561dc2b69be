"""One model, many layouts: losses, weights and checkpoints do not depend on how ranks share it."""

from pathlib import Path

import pytest
import torch

from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import DRAWN, LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train import jobs

pytestmark = pytest.mark.distributed

TP2 = ["parallel.tensor=2"]
TP2_SEQUENCE = ["parallel.tensor=2", "parallel.sequence=true"]
PP2 = ["parallel.pipeline=2"]
DP2 = ["parallel.data=2"]
TP2_PP2 = ["parallel.tensor=2", "parallel.pipeline=2"]
# Small batches keep the grid quick; the arithmetic per pack is the recipe's.
QUICK = ["train.global_batch=4", "parallel.data=1"]


def _ranks(layout: list[str]) -> int:
    product = 1
    for override in layout:
        value = override.partition("=")[2]
        product *= int(value) if value.isdigit() else 1
    return product


@pytest.fixture(scope="module")
def reference(ranks: RankPool, small_data: SmallData) -> dict[str, jobs.Trained]:
    """Ten steps of stages 0 and 1 on one rank."""
    common = [small_data.override, *QUICK]
    return {
        stage: ranks.run(1, jobs.train_from_scratch, LAPTOP / f"{stage}.yaml", common, 10)[0]
        for stage in ("stage0", "stage1")
    }


@pytest.mark.parametrize("stage", ["stage0", "stage1"])
@pytest.mark.parametrize("layout", [TP2, TP2_SEQUENCE, PP2, DP2], ids="-".join)
def test_losses_equal_one_rank(
    ranks: RankPool,
    small_data: SmallData,
    reference: dict[str, jobs.Trained],
    stage: str,
    layout: list[str],
) -> None:
    """Stage 0 covers a last pipeline stage with nothing trainable."""
    overrides = [small_data.override, *QUICK, *layout]
    results = ranks.run(
        _ranks(layout), jobs.train_from_scratch, LAPTOP / f"{stage}.yaml", overrides, 10
    )
    expected = reference[stage]
    for trained in results:
        assert trained.losses == pytest.approx(expected.losses, rel=1e-4)
        assert trained.grad_norms == pytest.approx(expected.grad_norms, rel=1e-3)
    if stage == "stage1":
        assert expected.losses[-1] < expected.losses[0]


@pytest.mark.parametrize("layout", [TP2, TP2_PP2], ids="-".join)
def test_drawn_weights_do_not_depend_on_the_layout(
    ranks: RankPool, small_data: SmallData, layout: list[str]
) -> None:
    file = DRAWN
    whole = ranks.run(1, jobs.drawn_sums, file, [small_data.override, *QUICK])[0]
    parts = ranks.run(_ranks(layout), jobs.drawn_sums, file, [small_data.override, *QUICK, *layout])
    added: dict[str, float] = {}
    for part in parts:
        for key, value in part.items():
            added[key] = added.get(key, 0.0) + value
    assert added.keys() == whole.keys()
    for key, value in whole.items():
        assert added[key] == pytest.approx(value, rel=1e-12), key


def test_checkpoint_crosses_layouts_and_back(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """TP2xPP2 -> one rank -> TP2xPP2: every tensor equal, the optimizer's too; the same losses."""
    file = LAPTOP / "stage1.yaml"
    common = [small_data.override, *QUICK]
    split, whole, back = (tmp_path / f"{name}/step_000003" for name in ("split", "whole", "back"))
    ranks.run(4, jobs.train_and_save, file, [*common, *TP2_PP2], 3, split)
    ranks.run(1, jobs.load_and_save, file, common, split, whole)
    ranks.run(4, jobs.load_and_save, file, [*common, *TP2_PP2], whole, back)
    first = full_tensors(split, optimizer=True)
    for other in (whole, back):
        tensors = full_tensors(other, optimizer=True)
        assert tensors.keys() == first.keys()
        for name, tensor in first.items():
            assert torch.equal(tensor, tensors[name]), name
    assert any(name.startswith("optimizer.state.exp_avg_sq.") for name in first)
    on_four = ranks.run(4, jobs.load_and_train, file, [*common, *TP2_PP2], split, 5)[0]
    on_one = ranks.run(1, jobs.load_and_train, file, common, whole, 5)[0]
    assert on_one.losses == pytest.approx(on_four.losses, rel=1e-6)


def test_resume_is_bitwise_on_one_rank(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    file, common = LAPTOP / "stage1.yaml", [small_data.override, *QUICK]
    checkpoint = tmp_path / "step_000003"
    straight = ranks.run(1, jobs.train_from_scratch, file, common, 6)[0]
    ranks.run(1, jobs.train_and_save, file, common, 3, checkpoint)
    resumed = ranks.run(1, jobs.load_and_train, file, common, checkpoint, 3)[0]
    assert resumed.losses == straight.losses[3:]
    assert resumed.grad_norms == straight.grad_norms[3:]
