"""Weights drawn by name, the same at any layout, by the stated rules; what is marked as split."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig, Part, Precision, StageConfig
from megatron_vl.engine import sharding
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.model.initialize import draw_tensor, initialize
from megatron_vl.model.vlm import VisionLanguageModel, part_of
from megatron_vl.train.build import build_model
from tests.support.one_rank import one_rank


def drawn(config: StageConfig, seed: int, parts: frozenset[Part] = frozenset(Part)) -> dict:
    """Stored tensors by name after a draw over weights that all held 7."""
    with one_rank() as groups:
        module = build_model(config, groups)
        sharding.fill(module, groups, lambda key, shape: torch.full(shape, 7.0))
        initialize(module, groups, config.model, seed, parts)
        return {
            shard.key: shard.data.detach().clone()
            for shard in sharding.sharded_tensors(module, groups)
        }


@pytest.fixture(scope="module")
def tensors(config: StageConfig) -> dict[str, Tensor]:
    return drawn(config, seed=5)


def test_the_same_seed_draws_the_same_and_another_seed_does_not(
    config: StageConfig, tensors: dict[str, Tensor]
) -> None:
    again, other = drawn(config, seed=5), drawn(config, seed=6)
    assert again.keys() == other.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(tensor, again[name]), name
        constant = bool((tensor == tensor.flatten()[0]).all())
        assert torch.equal(tensor, other[name]) == constant, name


def test_names_of_one_shape_get_numbers_of_their_own(tensors: dict[str, Tensor]) -> None:
    seen: dict[bytes, str] = {}
    for name, tensor in tensors.items():
        if float(tensor.std()) > 0:
            start = tensor.flatten()[:8].numpy().tobytes()
            assert start not in seen, (name, seen[start])
            seen[start] = name
    assert len(seen) > 60


def test_statistics_follow_the_rules(config: StageConfig, tensors: dict[str, Tensor]) -> None:
    """Normal with the part's width, narrower into the residual stream; constants exact."""
    seen = set()
    for name, tensor in tensors.items():
        kind, expected = rule(name)
        seen.add(kind)
        if kind == "constant":
            assert bool((tensor == expected).all()), name
            continue
        if kind == "normal":
            # Four standard errors of a standard deviation and of a mean.
            slack = 4 / math.sqrt(2 * tensor.numel())
            assert float(tensor.std()) == pytest.approx(scale(name, config), rel=slack), name
            assert abs(float(tensor.mean())) < 4 * scale(name, config) / tensor.numel() ** 0.5
        elif kind == "A":
            values = tensor.exp()
            assert 1 <= float(values.min()) <= float(values.max()) <= 16.001
            assert float(values.std()) > 1
        elif kind == "dt":
            values = torch.nn.functional.softplus(tensor)
            assert 0.9e-3 <= float(values.min()) <= float(values.max()) <= 0.101
        else:
            bound = 1 / math.sqrt(4)
            assert float(tensor.abs().max()) <= bound
            assert float(tensor.abs().max()) > 0.8 * bound
    assert seen == {"constant", "normal", "A", "dt", "uniform"}


def rule(name: str) -> tuple[str, float]:
    """How a stored tensor is drawn, told from its name alone, and its value if that is constant."""
    if "conv1d" in name:
        return "uniform", 0.5
    if name.endswith("A_log"):
        return "A", 0
    if name.endswith("dt_bias"):
        return "dt", 0
    if name.endswith(("mixer.D", "norm.weight", "layer_norm_weight")):
        return "constant", 1.0
    if name.endswith("bias"):
        return "constant", 0.0
    return "normal", 0


def scale(name: str, config: StageConfig) -> float:
    """The standard deviation a matrix is drawn with."""
    model = config.model
    part = part_of(name)
    if part is Part.projector:
        return model.projector.init_std
    std, layers = {
        Part.encoder: (model.encoder.init_std, 2 * model.encoder.num_layers),
        Part.decoder: (model.decoder.init_std, len(model.decoder.pattern)),
    }[part]
    last = name.endswith(("linear_proj.weight", "linear_fc2.weight", "out_proj.weight"))
    return std / math.sqrt(layers) if last else std


def test_only_the_wanted_parts_are_drawn(config: StageConfig, tensors: dict[str, Tensor]) -> None:
    for name, tensor in drawn(config, seed=5, parts=frozenset([Part.projector])).items():
        if part_of(name) is Part.projector:
            assert torch.equal(tensor, tensors[name]), name
        else:
            assert bool((tensor == 7).all()), name


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_holds_its_slice_of_the_full_tensor(config: StageConfig, rank: int) -> None:
    """Two tensor ranks: each part equals the slice of what one rank draws, and is one of two."""
    config = replace(config, parallel=ParallelConfig(tensor=2))
    split = 0
    with pretend_rank(config.parallel, rank) as groups:
        module = build_model(config, groups)
        initialize(module, groups, config.model, seed=5)
        for shard in sharding.sharded_tensors(module, groups):
            full = draw_tensor(shard.key, shard.global_shape, config.model, 5)
            axes = [d for d in range(full.dim()) if shard.data.shape[d] != full.shape[d]]
            if not axes:
                assert torch.equal(shard.data, full), shard.key
                continue
            split += 1
            assert len(axes) == 1, shard.key
            assert torch.equal(shard.data, full.chunk(2, dim=axes[0])[rank]), shard.key
    assert split > 60


def meta_rank(config: StageConfig, parallel: ParallelConfig) -> VisionLanguageModel:
    """One rank of a layout, on the meta device."""
    with pretend_rank(parallel) as groups, meta_device():
        module = VisionLanguageModel(
            config.model, parallel, Precision.fp32, TORCH_BLOCKS, groups, sequence_length=512
        )
        sharding.mark_tensor_parallel(module)
        return module


@pytest.mark.parametrize("sequence", [False, True], ids=["plain", "sequence"])
def test_exactly_the_split_parameters_are_marked(config: StageConfig, sequence: bool) -> None:
    """A parameter whose size depends on the number of tensor ranks is split, and marked so.

    A wrong mark counts a gradient twice, or not at all, in the norm that clips it.
    """
    whole = meta_rank(config, ParallelConfig())
    part = meta_rank(config, ParallelConfig(tensor=2, sequence=sequence))
    sizes = {name: parameter.shape for name, parameter in whole.named_parameters()}
    kinds = set()
    for name, parameter in part.named_parameters():
        split = parameter.shape != sizes[name]
        kinds.add(split)
        assert getattr(parameter, "tensor_model_parallel", False) == split, name
        if split and hasattr(parameter, "partition_dim") and parameter.dim() == 2:
            axis = parameter.partition_dim
            assert parameter.shape[axis] * 2 == sizes[name][axis], name
    assert kinds == {True, False}


def test_replicated_decoder_norms_sum_their_gradients_under_sequence_parallelism(
    config: StageConfig,
) -> None:
    """Each tensor rank norms its own part of the sequence; the encoder's sees all of it."""
    for sequence in (False, True):
        module = meta_rank(config, ParallelConfig(tensor=2, sequence=sequence))
        for name, parameter in module.named_parameters():
            is_norm = name.endswith(("layer_norm_weight", "final_norm.weight"))
            expected = sequence and is_norm and part_of(name) is Part.decoder
            assert getattr(parameter, "sequence_parallel", False) == expected, name


def test_fill_hands_out_every_tensor_once(config: StageConfig) -> None:
    asked: list[str] = []

    def counting(draw: Callable[[tuple[int, ...]], Tensor]) -> Callable[..., Tensor]:
        def one(key: str, shape: tuple[int, ...]) -> Tensor:
            asked.append(key)
            return draw(shape)

        return one

    with one_rank() as groups:
        module = build_model(config, groups)
        sharding.fill(module, groups, counting(lambda shape: torch.full(shape, 3.5)))
        assert len(asked) == len(set(asked))
        for name, parameter in module.named_parameters():
            assert bool((parameter == 3.5).all()), name
