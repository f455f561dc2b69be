"""Quantized tensors back to numbers, and inputs as a quantized product sees them.

The reading side of `quantize`: written from the formats alone, so that a fault of the writing side
shows. Both layouts; see `quantized_layout` for the names.

Rows are done a few at a time. Shapes: R rows, K columns.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from checkpoint_tools import quantize
from checkpoint_tools.names import Rule
from checkpoint_tools.quantized_layout import COMPRESSED, FP8, Quantization, applies, outputs

_E2M1 = torch.tensor([*quantize.E2M1_VALUES, *(-value for value in quantize.E2M1_VALUES)])


def read_decoded(
    read: Callable[[str], Tensor], name: str, rule: Rule, chosen: Quantization | None
) -> Tensor:
    """A published tensor, as the numbers it stands for where it is quantized (then float32).

    Args:
        read: gives a tensor that lies in the folder.
        name: under which the BF16 release has it, one of the rule's.
        chosen: how the folder is quantized; None where it is not.
    """
    if chosen is None or not applies(rule):
        return read(name)
    module = name.removesuffix(".weight")
    return decoded_weight(held_of(read, module, rule, chosen), module, chosen)


def held_of(
    read: Callable[[str], Tensor], module: str, rule: Rule, chosen: Quantization
) -> dict[str, Tensor]:
    """A quantized module's tensors, codes and scales, by name."""
    names = (name for name in outputs(rule, chosen) if name.rpartition(".")[0] == module)
    return {name: read(name) for name in names}


def decoded_weight(held: Mapping[str, Tensor], module: str, chosen: Quantization) -> Tensor:
    """A quantized module's weight, float32 (R, K).

    Args:
        held: the module's tensors by their published names.
    """
    scale = held[module + ".weight_scale"]
    if chosen.format == FP8:
        return held[module + ".weight"].float() * scale.float()
    if chosen.layout == COMPRESSED:
        codes, tensor_scale = held[module + ".weight_packed"], held[module + ".weight_global_scale"]
        return from_fp4(codes, scale.float() / tensor_scale)
    return from_fp4(held[module + ".weight"], scale.float() * held[module + ".weight_scale_2"])


def from_fp4(codes_RC: Tensor, steps_RB: Tensor) -> Tensor:
    """Numbers (R, K) of packed codes (R, K/2), each block of 16 with its step (R, K/16)."""
    halves = torch.stack([codes_RC & 15, codes_RC >> 4], dim=-1).flatten(1)
    values_RK = _E2M1.to(codes_RC.device)[halves.long()]
    return (values_RK.unflatten(1, (-1, quantize.GROUP)) * steps_RB.unsqueeze(-1)).flatten(1)


def input_scale(held: Mapping[str, Tensor], module: str, chosen: Quantization) -> Tensor:
    """The stored scale of a module's input, a float32 number."""
    name = ".input_scale"
    if chosen.format != FP8 and chosen.layout == COMPRESSED:
        name = ".input_global_scale"
    return held[module + name].float().reshape(())


def fake_quantized(input_: Tensor, scale: Tensor, chosen: Quantization) -> Tensor:
    """An input as a quantized product sees it, in its own type and shape.

    Args:
        input_: (..., K).
        scale: as `input_scale` gives it. FP8: static. NVFP4: static for the tensor, with block
            scales from the input itself.
    """
    rows_RK = input_.flatten(0, -2)
    if chosen.format == FP8:
        seen_RK = quantize.to_fp8(rows_RK, scale).float() * scale
    else:
        inverse = chosen.layout == COMPRESSED
        packed = quantize.to_fp4(rows_RK, scale, inverse=inverse)
        blocks_RB = packed.block_scales.float()
        seen_RK = from_fp4(packed.codes, blocks_RB / scale if inverse else blocks_RB * scale)
    return seen_RK.to(input_.dtype).view_as(input_)
