"""Bytes of a rank against ranks that are built, and against buffers that are allocated."""

import pytest

from megatron_vl.config.schema import ParallelConfig, Part, Precision, StageConfig, TrainConfig
from megatron_vl.cost.bytes import RankBytes, rank_bytes, rank_parameters
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.model.vlm import VisionLanguageModel, part_of
from tests.conftest import LAPTOP
from tests.cost.byte_jobs import held
from tests.support.ranks import RankPool
from tests.support.sizes import full_size

ALL = list(Part)


def built(parallel: ParallelConfig, rank: int) -> dict[str, int]:
    counts = dict.fromkeys(("encoder", "projector", "decoder"), 0)
    with pretend_rank(parallel, rank) as groups, meta_device():
        model = VisionLanguageModel(
            full_size(),
            parallel,
            Precision.bf16,
            TORCH_BLOCKS,
            groups,
            sequence_length=1024,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
        )
    for name, parameter in model.named_parameters():
        counts[part_of(name).value] += parameter.numel()
    return counts


@pytest.mark.parametrize(
    ("parallel", "stage"),
    [
        (ParallelConfig(), 0),
        (ParallelConfig(tensor=8, sequence=True), 0),
        *((ParallelConfig(tensor=8, pipeline=4, first_stage_layers=14), s) for s in range(4)),
        *((ParallelConfig(tensor=2, pipeline=2, data=2), s) for s in range(2)),
    ],
)
def test_a_rank_of_the_published_model_has_as_many_parameters(
    parallel: ParallelConfig, stage: int
) -> None:
    rank = stage * parallel.tensor * parallel.data
    assert rank_parameters(full_size(), parallel, stage) == built(parallel, rank)


def test_one_rank_holds_all() -> None:
    assert (
        rank_parameters(full_size(), ParallelConfig(), 0) == model_parameters(full_size()).by_part()
    )


def published(parallel: ParallelConfig, trainable: list[Part], precision: Precision) -> RankBytes:
    train = TrainConfig(trainable=trainable)
    config = StageConfig(model=full_size(), parallel=parallel, train=train, precision=precision)
    return rank_bytes(config, 0)


def test_bytes_by_hand() -> None:
    decoder = rank_parameters(full_size(), ParallelConfig(tensor=8, data=32), 0)
    everything = sum(decoder.values())
    found = published(ParallelConfig(tensor=8, data=32, context=2), ALL, Precision.bf16)
    assert found == RankBytes(2 * everything, 4 * everything, -(-12 * everything // 64))
    assert found.total == found.weights + found.gradients + found.optimizer
    # In float32 the weights are what the optimizer steps.
    exact = published(ParallelConfig(), ALL, Precision.fp32)
    total = model_parameters(full_size()).total
    assert exact == RankBytes(4 * total, 4 * total, 8 * total)
    # Stage 0: frozen parts have weights alone.
    frozen = published(ParallelConfig(tensor=8, data=32), [Part.projector], Precision.bf16)
    assert frozen.weights == 2 * everything
    assert frozen.gradients == 4 * decoder["projector"]


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("trainable", ["encoder,projector,decoder", "projector"])
def test_what_a_rank_allocates(ranks: RankPool, precision: str, trainable: str) -> None:
    """Laptop sizes on two data-parallel ranks, after a step: buffers are padded a little."""
    overrides = [
        f"precision={precision}", f"train.trainable=[{trainable}]", "parallel.data=2",
        "data.sequence_length=256",
    ]  # fmt: skip
    for expected, found in ranks.run(2, held, LAPTOP / "stage1.yaml", overrides):
        assert found.weights == expected.weights
        for name in ("gradients", "optimizer"):
            ours, theirs = getattr(expected, name), getattr(found, name)
            assert ours <= theirs * 1.002
            assert theirs <= ours * 1.02 + 4096, name
