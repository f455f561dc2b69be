"""Bytes of a rank against ranks that are built, and against buffers that are allocated."""

import math
import random
from dataclasses import replace

import pytest

from megatron_vl.config.schema import ParallelConfig, Part, Precision, StageConfig, TrainConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.bytes import gradient_buffer, rank_bytes
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.cost.tensors import ParameterTensor, rank_tensors
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.model.vlm import VisionLanguageModel, part_of
from tests.conftest import LAPTOP
from tests.cost.byte_jobs import held
from tests.support.ranks import RankPool
from tests.support.sizes import full_size

ALL = list(Part)


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> dict[str, int]:
    """Parameters of each part (encoder, projector, decoder) on a rank of a pipeline stage."""
    counts = dict.fromkeys((part.value for part in Part), 0)
    for tensor in rank_tensors(model, parallel, stage):
        counts[tensor.part] += tensor.size
    return counts


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


LAYOUTS = {
    "TP2-SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP2-uneven": (2, ["parallel.pipeline=2", "parallel.first_stage_layers=3"]),
    "CP2": (2, ["parallel.context=2", "data.document_alignment=4"]),
    "TP2-DP2-bf16-projector": (
        4, ["parallel.tensor=2", "parallel.data=2", "precision=bf16", "train.trainable=[projector]"]
    ),
    "PP2-CP2-fp8": (
        4, ["parallel.pipeline=2", "parallel.context=2", "precision=fp8_blockwise",
            "data.document_alignment=4"]
    ),
}  # fmt: skip
"""Every axis, both kinds of freezing, all three widths. The global batch has a pack a rank."""


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_a_rank_allocates_to_the_byte(ranks: RankPool, name: str) -> None:
    """Laptop sizes, after a step: buffers with their padding, and each rank's own share."""
    size, overrides = LAYOUTS[name]
    data = ["parallel.data=1"] * all("parallel.data" not in text for text in overrides)
    short = ["data.sequence_length=256", "train.global_batch=2"]
    results = ranks.run(size, held, LAPTOP / "stage1.yaml", [*data, *short, *overrides])
    for expected, found in results:
        # The FP8 copies are Transformer Engine's; the torch kernels keep none.
        assert replace(expected, fp8_copies=0) == found
    assert any(expected.fp8_copies for expected, _ in results) == ("fp8" in name)


def published(parallel: ParallelConfig, trainable: list[Part], precision: Precision) -> StageConfig:
    train = TrainConfig(trainable=trainable)
    return StageConfig(model=full_size(), parallel=parallel, train=train, precision=precision)


def test_bytes_by_hand() -> None:
    parallel = ParallelConfig(tensor=8, data=32, context=2)
    everything = sum(rank_parameters(full_size(), parallel, 0).values())
    # 62 + 32 layers of few tensors each: padding is below a millionth of 1.6 B.
    found = rank_bytes(published(parallel, ALL, Precision.bf16), 0)
    for bytes_found, unpadded in (
        (found.weights, 2 * everything),
        (found.gradients, 4 * everything),
        (found.optimizer * 64, 12 * everything),
    ):
        assert unpadded <= bytes_found <= unpadded * (1 + 1e-4)
    assert found.total == found.weights + found.gradients + found.optimizer
    # In float32 the weights are what the optimizer steps.
    total = model_parameters(full_size()).total
    exact = rank_bytes(published(ParallelConfig(), ALL, Precision.fp32), 0)
    assert exact.optimizer == 8 * total
    assert 4 * total <= exact.weights == exact.gradients < 4 * total * (1 + 1e-4)
    # Stage 0: frozen parts have weights alone.
    projector = rank_parameters(full_size(), parallel, 0)["projector"]
    frozen = rank_bytes(published(parallel, [Part.projector], Precision.bf16), 0)
    assert frozen.weights == 2 * everything
    assert frozen.gradients == 4 * projector


def test_shares_of_a_buffer_add_up() -> None:
    """An odd number of ranks: no element is held twice or by nobody."""
    sizes = random.Random(7).choices(range(1, 900), k=40)
    tensors = [ParameterTensor("decoder", f"t{n}", size) for n, size in enumerate(sizes)]
    buffer = gradient_buffer(tensors, 3)
    assert buffer.size % math.lcm(3, 128) == 0
    assert sum(buffer.held(shard) for shard in range(3)) == sum(sizes)
    assert buffer.held(buffer.largest_shard()) == max(map(buffer.held, range(3)))
    assert all(start % 64 == 0 for start, _ in buffer.places)


def test_fp8_copies_by_hand() -> None:
    """Of one rank: both axes of every matrix between the ends, a scale for 128 x 128 of each."""
    parallel = ParallelConfig(tensor=8)
    config = published(parallel, ALL, Precision.fp8_blockwise)
    sizes = [
        tensor.size
        for tensor in rank_tensors(full_size(), parallel, 0)
        if tensor.name.endswith(("in_proj.weight", "out_proj.weight", "qkv.weight", ".proj.weight"))
        or tensor.name.endswith(("fc1.weight", "fc2.weight"))
    ]
    ends = [
        tensor.size
        for tensor in rank_tensors(full_size(), parallel, 0)
        if tensor.name.startswith(("layers.0.", "layers.61.")) or "layers.31." in tensor.name
        if tensor.name.endswith("weight") and "norm" not in tensor.name
        if "conv1d" not in tensor.name
        if not (tensor.part == "decoder" and "layers.31." in tensor.name)
    ]
    expected = sum(2 * (size + -(-size // 16384) * 4) for size in sizes)
    expected -= sum(2 * (size + -(-size // 16384) * 4) for size in ends)
    assert rank_bytes(config, 0).fp8_copies == expected
    config.train.trainable = [Part.decoder]
    assert rank_bytes(config, 0).fp8_copies < expected
    assert rank_bytes(published(parallel, ALL, Precision.bf16), 0).fp8_copies == 0
