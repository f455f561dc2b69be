"""Quantization-aware distillation: what it lowers, what it leaves, at several layouts, cut off and
gone on with. What is made of a student: `tests/checkpoint_tools/test_distilled.py`."""

from pathlib import Path

import pytest
import torch

from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train import distill_jobs
from tests.train.conftest import QUICK
from tests.train.distill_jobs import Distilled

pytestmark = pytest.mark.distributed

QAD = LAPTOP / "qad_nvfp4.yaml"
COMMON = [
    *QUICK, "distill.calibration_batches=2", "train.steps=4", "evaluation.batches=1",
    "optimizer.lr=1e-4",  # the recipe's is for eight times the batch
]  # fmt: skip


def distilled(
    ranks: RankPool, data: SmallData, overrides: list[str], num_steps: int, *folders: Path | None
) -> Distilled:
    every = [data.override, *COMMON, *overrides]
    return ranks.run(1, distill_jobs.distilled, QAD, every, num_steps, *folders)[0]


def from_afar(
    ranks: RankPool, data: SmallData, layout: list[str], size: int, teacher: Path
) -> list[Distilled]:
    every = [data.override, *COMMON, "data.document_alignment=4", *layout]
    return ranks.run(size, distill_jobs.far, QAD, every, 2, teacher)


@pytest.fixture(scope="module")
def alone(ranks: RankPool, small_data: SmallData, checkpoint: Path) -> Distilled:
    """Three steps on one rank."""
    return distilled(ranks, small_data, [], 3, checkpoint)


@pytest.fixture(scope="module")
def far(ranks: RankPool, small_data: SmallData, checkpoint: Path) -> Distilled:
    """Two steps on one rank of a student that starts from other weights than its teacher's."""
    return from_afar(ranks, small_data, [], 1, checkpoint)[0]


def test_the_divergence_falls_and_the_teacher_stays(alone: Distilled) -> None:
    assert 0 < alone.after < 0.97 * alone.before
    assert alone.teacher[0] == alone.teacher[1]
    assert alone.digest != alone.teacher[1]


@pytest.mark.parametrize(
    ("layout", "size"),
    [
        (["parallel.tensor=2", "parallel.sequence=true"], 2),
        (["parallel.pipeline=2", "parallel.context=2"], 4),
    ],
    ids=["TP2+SP", "PP2xCP2"],
)
def test_a_layout_distils_as_one_rank(
    ranks: RankPool,
    small_data: SmallData,
    checkpoint: Path,
    far: Distilled,
    layout: list[str],
    size: int,
) -> None:
    """To 1e-5 nats of a divergence of 0.05: far from the teacher, where it is large beside what
    float32 sums in another order change. A number on the border of two codes then takes the other.
    """
    assert far.after < far.before
    for rank in from_afar(ranks, small_data, layout, size, checkpoint):
        numbers, expected = ([*one.losses, one.before, one.after] for one in (rank, far))
        assert numbers == pytest.approx(expected, abs=1e-5)
        assert rank.grad_norms[0] == pytest.approx(far.grad_norms[0], rel=1e-3)
        assert rank.inputs == pytest.approx(far.inputs, rel=1e-5)
        assert rank.teacher[0] == rank.teacher[1]


def test_bfloat16_distils_as_float32(
    ranks: RankPool, small_data: SmallData, checkpoint: Path, far: Distilled
) -> None:
    (found,) = from_afar(ranks, small_data, ["precision=bf16"], 1, checkpoint)
    assert found.losses == pytest.approx(far.losses, rel=0.05)
    assert found.inputs == pytest.approx(far.inputs, rel=0.05)
    assert found.teacher[0] == found.teacher[1]


def test_goes_on_bitwise(
    ranks: RankPool, small_data: SmallData, checkpoint: Path, alone: Distilled, tmp_path: Path
) -> None:
    """From a save after two steps; the calibration is the save's, its data is not looked at."""
    cut = tmp_path / "step_000002"
    first = distilled(ranks, small_data, [], 2, checkpoint, None, cut)
    other = ["distill.calibration_batches=1"]
    last = distilled(ranks, small_data, other, 1, checkpoint, cut)
    assert [*first.losses, *last.losses] == alone.losses
    assert [*first.grad_norms, *last.grad_norms] == alone.grad_norms
    assert last.inputs == alone.inputs
    assert (last.digest, last.after) == (alone.digest, alone.after)
    assert last.teacher == alone.teacher
    stored = full_tensors(cut, optimizer=True)
    assert {name for name in stored if name.startswith("fake_quant.")} >= {
        "fake_quant.seen",
        "fake_quant.input_amax.decoder.0.mixer.in_proj",
    }
    weights = full_tensors(cut)
    assert weights.keys() == full_tensors(checkpoint).keys()
    assert torch.is_floating_point(next(iter(weights.values())))
