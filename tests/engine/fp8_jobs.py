"""What ranks do in the FP8 tests: one linear forward and backward, whole tensors in and out."""

from dataclasses import dataclass

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.fp8_linear import (
    Arithmetic,
    Blockwise,
    Delayed,
    Fp8Capable,
    Fp8LayerNormColumnParallelLinear,
    Fp8RowParallelLinear,
    Tensorwise,
)
from megatron_vl.engine.fp8_state import AmaxHistory, Place

TOKENS, INPUTS, OUTPUTS = 48, 256, 512
SHARED = {"bias": True, "skip_bias_add": False, "init_method": None, "is_expert": False}


@dataclass(frozen=True)
class Passed:
    """What one pass over a linear gave, in full shape."""

    output: Tensor
    grad_input: Tensor
    grad_weight: Tensor
    grad_bias: Tensor


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear_config(parallel: ParallelConfig) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=2,
        normalization="RMSNorm",
        params_dtype=torch.float32,
        tensor_model_parallel_size=parallel.tensor,
        sequence_parallel=parallel.sequence,
        perform_initialization=False,
        gradient_accumulation_fusion=False,
    )


def arithmetic_of(
    recipe: str, groups: ProcessGroupCollection
) -> tuple[Arithmetic, AmaxHistory | None]:
    if recipe == "blockwise":
        return Blockwise(), None
    if recipe == "tensorwise":
        return Tensorwise(), None
    history = AmaxHistory([Place("decoder.0", "linear")], 4, groups)
    return Delayed(history.reference_I3[0], history.current_I3[0]), history


def build(kind: str, parallel: ParallelConfig, groups: ProcessGroupCollection) -> Fp8Capable:
    """A linear with weights and bias drawn in full shape and cut."""
    config = linear_config(parallel)
    if kind == "column":
        linear = Fp8LayerNormColumnParallelLinear(
            INPUTS, OUTPUTS, config=config, gather_output=False, tp_group=groups.tp, **SHARED
        )
        linear.layer_norm_weight.data.copy_(1 + drawn(5, INPUTS) / 9)
    else:
        linear = Fp8RowParallelLinear(
            INPUTS, OUTPUTS, config=config, input_is_parallel=True, tp_group=groups.tp, **SHARED
        )
    axis = 0 if kind == "column" else 1
    linear.weight.data.copy_(part(drawn(1, OUTPUTS, INPUTS), axis, groups))
    bias = drawn(2, OUTPUTS)
    linear.bias.data.copy_(part(bias, 0, groups) if kind == "column" else bias)
    return linear


def part(whole: Tensor, axis: int, groups: ProcessGroupCollection) -> Tensor:
    return whole.chunk(groups.tp.size(), axis)[groups.tp.rank()]


def joined(mine: Tensor, axis: int, groups: ProcessGroupCollection) -> Tensor:
    parts = [torch.empty_like(mine) for _ in range(groups.tp.size())]
    torch.distributed.all_gather(parts, mine.contiguous(), group=groups.tp)
    return torch.cat(parts, axis)


def summed(mine: Tensor, groups: ProcessGroupCollection) -> Tensor:
    total = mine.clone()
    torch.distributed.all_reduce(total, group=groups.tp)
    return total


def one_pass(
    linear: Fp8Capable, kind: str, parallel: ParallelConfig, groups: ProcessGroupCollection
) -> Passed:
    """Forward and backward; what each rank holds a part of is joined."""
    whole = drawn(3, TOKENS, 1, INPUTS) * torch.linspace(0.5, 20, TOKENS).view(-1, 1, 1)
    gradient = drawn(4, TOKENS, 1, OUTPUTS) / 1000
    column = kind == "column"
    split = 0 if parallel.sequence else None
    in_axis, out_axis = (split, 2) if column else (2, split)
    given = whole if in_axis is None else part(whole, in_axis, groups)
    given = given.clone().requires_grad_()
    output, _ = linear(given)
    output.backward(gradient if out_axis is None else part(gradient, out_axis, groups).clone())
    grads = [given.grad, linear.weight.grad, linear.bias.grad]
    linear.zero_grad()
    grad_input, grad_weight, grad_bias = grads
    if column:
        grad_bias = joined(grad_bias, 0, groups)
    elif parallel.sequence:
        grad_bias = summed(grad_bias, groups)
    return Passed(
        output.detach() if out_axis is None else joined(output.detach(), out_axis, groups),
        grad_input if in_axis is None else joined(grad_input, in_axis, groups),
        joined(grad_weight, 0 if column else 1, groups),
        grad_bias,
    )


def passes(parallel: ParallelConfig) -> dict[tuple[str, str], list[Passed]]:
    """Two passes of every kind and recipe at a layout, each a step of its own."""
    groups = process_groups.create(parallel, seed=0)
    found: dict[tuple[str, str], list[Passed]] = {}
    for kind in ("column", "row"):
        for recipe in ("blockwise", "tensorwise", "delayed"):
            linear = build(kind, parallel, groups)
            linear.arithmetic, history = arithmetic_of(recipe, groups)
            found[kind, recipe] = []
            for _ in range(2):
                found[kind, recipe].append(one_pass(linear, kind, parallel, groups))
                if history is not None:
                    history.advance()
    return found
