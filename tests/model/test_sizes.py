"""The published 12B sizes, built on the meta device, and the committed list of parameter names."""

from pathlib import Path

import pytest
import torch

from megatron_vl.config.schema import ParallelConfig, Part, Precision
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.model.vlm import VisionLanguageModel, part_of
from tests.support.sizes import full_size

NANO_12B = full_size()
NAMES = Path(__file__).with_name("parameter_names.txt")


def build(parallel: ParallelConfig, rank: int = 0) -> VisionLanguageModel:
    with pretend_rank(parallel, rank) as groups, meta_device():
        return VisionLanguageModel(
            NANO_12B,
            parallel,
            Precision.bf16,
            TORCH_BLOCKS,
            groups,
            sequence_length=16384,
            pre_process=groups.pp.rank() == 0,
            post_process=groups.pp.rank() == groups.pp.size() - 1,
        )


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_published_sizes() -> None:
    model = build(ParallelConfig())
    assert count(model.language_model) == 12_310_001_152
    assert count(model.vision_projection) == 209_720_320
    assert count(model.vision_model) == 651_653_120
    counted = model_parameters(NANO_12B)
    assert counted.decoder.total == count(model.language_model)
    assert counted.projector == count(model.vision_projection)
    assert counted.encoder.total == count(model.vision_model)
    layers = model.language_model.decoder.layer_type_list
    assert [layers.count(kind) for kind in "M-*"] == [28, 28, 6]


def test_parameter_names_are_the_committed_list() -> None:
    """Layers of one kind share their names, so the list holds each name once, layers as N."""
    names = set()
    for name, _ in build(ParallelConfig()).named_parameters():
        assert part_of(name) in Part
        names.add(".".join("N" if word.isdigit() else word for word in name.split(".")))
    assert sorted(names) == NAMES.read_text().splitlines()


@pytest.mark.parametrize("rank", range(4))
def test_uneven_pipeline_builds_every_layer(rank: int) -> None:
    """TP8 x PP4 with 14 layers on the first stage: 14 + 3 x 16."""
    parallel = ParallelConfig(tensor=8, pipeline=4, first_stage_layers=14)
    model = build(parallel, rank=8 * rank)
    assert len(model.language_model.decoder.layers) == (14 if rank == 0 else 16)
    assert hasattr(model, "vision_model") == (rank == 0)


def test_the_published_long_context_layout_builds() -> None:
    """TP8 x CP8: two of a tensor rank's 16 Mamba heads on a context rank, its one group on all."""
    model = build(ParallelConfig(tensor=8, context=8, sequence=True), rank=23)
    mixer = model.language_model.decoder.layers[0].mixer
    assert mixer.cp.nheads_local_tpcp == 2
    assert (mixer.cp.ngroups_local_tpcp, mixer.cp.group_repeat_count) == (1, 8)
    assert mixer.cp.cp_rank == 2
    assert model.vision_model.config.context_parallel_size == 1


def test_a_split_that_loses_layers_is_refused() -> None:
    with pytest.raises(ValueError, match=r"would build 60; set parallel\.first_stage_layers=14"):
        build(ParallelConfig(tensor=8, pipeline=4))
