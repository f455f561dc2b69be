"""A layout needs as many ranks as it multiplies to, and says so."""

import pytest
import torch.distributed

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.meta import pretend_rank
from tests.support.one_rank import one_rank


def test_a_wrong_world_size_is_refused_with_the_way_out() -> None:
    with one_rank():
        process_groups.destroy()
        wrong = ParallelConfig(tensor=2, pipeline=3, context=1, data=4)
        with pytest.raises(ValueError) as raised:
            process_groups.create(wrong, seed=0)
    said = str(raised.value)
    assert "asks for 24 ranks (tensor 2 x pipeline 3 x context 1 x data 4), 1 joined" in said
    assert "so that the product is 1" in said


def test_a_layout_may_follow_another_in_the_same_world() -> None:
    with one_rank():
        process_groups.destroy()
        again = process_groups.create(ParallelConfig(), seed=3)
        assert again.tp.size() == again.pp.size() == again.dp.size() == 1
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, (0, 0, 0)), (1, (1, 0, 0)), (2, (0, 1, 0)), (5, (1, 2, 0)), (6, (0, 0, 1))],
    ids=str,
)
def test_tensor_ranks_are_neighbours_then_data_then_pipeline(
    rank: int, expected: tuple[int, int, int]
) -> None:
    with pretend_rank(ParallelConfig(tensor=2, pipeline=2, data=3), rank) as groups:
        assert (groups.tp.rank(), groups.dp.rank(), groups.pp.rank()) == expected
        assert (groups.tp.size(), groups.dp.size(), groups.pp.size()) == (2, 3, 2)


def test_pretending_inside_a_real_world_is_refused() -> None:
    with (
        one_rank(),
        pytest.raises(RuntimeError, match="not joined"),
        pretend_rank(ParallelConfig()),
    ):
        pass


def test_a_rank_without_a_gpu_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL would say "Duplicate GPU detected", after a while and without a way out."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert process_groups._own_gpu() == 1
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        ValueError, match=r"there are 2, .*parallel\.data=2 .*CUDA_VISIBLE_DEVICES="
    ):
        process_groups._own_gpu()
    monkeypatch.setenv("SLURM_PROCID", "2")
    assert process_groups._own_gpu() == 0
