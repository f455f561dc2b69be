"""Draws starting weights that do not depend on the layout.

Every stored tensor is drawn in its full shape from a generator seeded by the run's seed and the
tensor's own name; each rank keeps its shard. One rank or 512, the same name gets the same numbers,
so a run started at TP2xPP2 is the run started on one rank.

Rules (sources: Megatron-LM's scaled initialisation; Mamba-2's published initialisation, through
megatron-core's MambaMixer): matrices are normal with the part's `init_std`; matrices that write
into the residual stream are scaled by 1/sqrt(writes), of which a decoder layer makes one and an
encoder layer two; norms start at 1, biases at 0; A is uniform in 1..16; dt is log-uniform in
1e-3..0.1; D is 1; convolutions are uniform within +-1/sqrt(width).

Cost: each rank draws every full tensor once, on the CPU. For 12B starting weights use a released
checkpoint instead of drawing them.
"""

import hashlib
import math

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vl.config.schema import Part
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.engine.sharding import fill
from megatron_vl.model.vlm import VisionLanguageModel, part_of

A_RANGE = (1.0, 16.0)
DT_RANGE = (1e-3, 0.1)
DT_FLOOR = 1e-4
WRITES_TO_RESIDUAL = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")


def generator_for(seed: int, key: str) -> torch.Generator:
    """A CPU generator whose stream depends on the seed and the tensor's name alone."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def initialize(
    module: VisionLanguageModel,
    groups: ProcessGroupCollection,
    model: ModelConfig,
    seed: int,
    parts: frozenset[Part] = frozenset(Part),
) -> None:
    """Draw the weights of `parts`, in place.

    Args:
        seed: the run's seed; the same seed gives the same weights at any layout.
        parts: which parts to draw; the others keep what they hold.
    """

    def draw(key: str, shape: tuple[int, ...]) -> Tensor:
        return draw_tensor(key, shape, model, seed)

    fill(module, groups, draw, lambda key: part_of(key) in parts)


def draw_tensor(key: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The full starting tensor of one stored name, float32 on the CPU."""
    generator = generator_for(seed, key)
    owner, _, leaf = key.rpartition(".")
    if leaf in ("A_log", "dt_bias", "D"):
        return _state_space(leaf, shape, generator)
    if "conv1d" in key:
        bound = 1 / math.sqrt(_convolution_width(shape))
        return torch.empty(shape).uniform_(-bound, bound, generator=generator)
    if leaf in ("bias", "layer_norm_bias"):
        return torch.zeros(shape)
    if leaf == "layer_norm_weight" or owner.endswith("norm"):
        return torch.ones(shape)
    return torch.empty(shape).normal_(0.0, _std(key, model), generator=generator)


def _convolution_width(shape: tuple[int, ...]) -> int:
    """Taps of the convolution that a weight (channels, 1, taps) or a bias (channels) belongs to."""
    return shape[-1] if len(shape) == 3 else 4


def _state_space(leaf: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if leaf == "D":
        return torch.ones(shape)
    uniform = torch.rand(shape, generator=generator)
    if leaf == "A_log":
        return torch.log(A_RANGE[0] + uniform * (A_RANGE[1] - A_RANGE[0]))
    low, high = (math.log(bound) for bound in DT_RANGE)
    dt = torch.exp(low + uniform * (high - low)).clamp(min=DT_FLOOR)
    # The inverse of softplus, so that softplus(dt_bias) is dt.
    return dt + torch.log(-torch.expm1(-dt))


def _std(key: str, model: ModelConfig) -> float:
    part = part_of(key)
    if part is Part.projector:
        return model.projector.init_std
    if part is Part.encoder:
        std, writes = model.encoder.init_std, 2 * model.encoder.num_layers
    else:
        std, writes = model.decoder.init_std, len(model.decoder.pattern)
    return std / math.sqrt(writes) if key.endswith(WRITES_TO_RESIDUAL) else std
