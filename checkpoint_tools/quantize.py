"""Weights to FP8 and NVFP4: pure functions of a tensor and its largest magnitudes.

FP8: E4M3 bytes and one scale a tensor, value = byte * scale, scale = amax / 448. The quotient is
rounded to the weight's type first.
NVFP4: E2M1 codes, two to a byte (even column in the low half), one E4M3 scale for each 16 columns
and one float32 scale a tensor: value = code * block scale * tensor scale, tensor scale =
amax / (6 * 448), block scale = block amax / (6 * tensor scale), in float32.

Roundings are to nearest, ties to even. Rows are done a few at a time, so the peak is the result and
a few megabytes.

Source of the formats, and of the order of operations, byte for byte: NVIDIA's Model Optimizer and
llm-compressor with compressed-tensors. They differ in names and in which way round NVFP4's tensor
scale is stored; see `quantized_layout`.

Shapes: R rows, K columns.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9
E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code; bit 3 is the sign."""
E2M1_LARGEST = E2M1_VALUES[-1]
GROUP = 16
"""Columns that share a block scale."""
_OF_ZEROS = {False: 1.0, True: 0.125}
"""Block scale of sixteen zeros, by `inverse`: what either tool writes."""
_SMALLEST_STEP = 2.0**-149
_BLOCK_NUMBERS = 1 << 18
"""Numbers done at a time: what is made of them on the way stays in a core's cache."""


@dataclass(frozen=True)
class Fp4:
    """A tensor in NVFP4.

    Attributes:
        codes: uint8 (R, K/2).
        block_scales: float8_e4m3fn (R, K/16).
    """

    codes: Tensor
    block_scales: Tensor


def amax(weight_RK: Tensor) -> Tensor:
    """The largest magnitude, float32; at least the smallest normal number, so that scales exist.

    Raises:
        ValueError: it is infinite or NaN.
    """
    low, high = torch.aminmax(weight_RK)
    largest = torch.maximum(-low, high).float()
    if not bool(largest.isfinite()):
        raise ValueError("a weight is infinite or NaN and cannot be quantized")
    return largest.clamp(min=torch.finfo(torch.float32).tiny)


def fp8_scale(largest: Tensor) -> Tensor:
    """The scale that maps `largest` to the largest FP8 number."""
    return largest.float() / E4M3_LARGEST


def to_fp8(weight_RK: Tensor, scale: Tensor) -> Tensor:
    """E4M3 bytes (R, K) of a weight; what exceeds the range saturates."""
    quantized_RK = torch.empty(weight_RK.shape, dtype=E4M3)
    for rows, out in zip(_rows(weight_RK), _rows(quantized_RK), strict=True):
        out.copy_((rows / scale).to(rows.dtype).clamp_(-E4M3_LARGEST, E4M3_LARGEST))
    return quantized_RK


def fp4_scale(largest: Tensor) -> Tensor:
    """The tensor scale with which the block of `largest` gets the largest block scale."""
    return largest.float() / (E2M1_LARGEST * E4M3_LARGEST)


def to_fp4(weight_RK: Tensor, tensor_scale: Tensor, *, inverse: bool = False) -> Fp4:
    """Codes and block scales of a weight; K is a multiple of 16.

    Args:
        inverse: `tensor_scale` is one over the scale, as compressed-tensors stores it.
    """
    rows_count, columns = weight_RK.shape
    codes = torch.empty(rows_count, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows_count, columns // GROUP, dtype=E4M3)
    triples = zip(_rows(weight_RK), _rows(codes, columns), _rows(scales, columns), strict=True)
    for rows, code, scale in triples:
        blocks_RBG = rows.unflatten(1, (-1, GROUP))
        largest_RB = _magnitude(blocks_RBG)
        if inverse:  # llm-compressor's statistics have the weight's type
            wanted_RB = tensor_scale * (largest_RB / E2M1_LARGEST)
        else:
            wanted_RB = largest_RB.float() / (E2M1_LARGEST * tensor_scale)
        wanted_RB = torch.where(wanted_RB == 0, _OF_ZEROS[inverse], wanted_RB)
        scale.copy_(wanted_RB.clamp(E4M3_SMALLEST, E4M3_LARGEST))
        steps_RB = scale.float() / tensor_scale if inverse else scale.float() * tensor_scale
        # Where a tensor is next to nothing a step may be 0 or none at all: 0 / 0 is to be 0.
        steps_RB = steps_RB.nan_to_num_(nan=torch.inf, posinf=torch.inf).clamp_(min=_SMALLEST_STEP)
        pairs = e2m1_codes(blocks_RBG / steps_RB.unsqueeze(-1)).flatten(1).view(torch.int16)
        code.copy_(pairs | pairs >> 4)  # the odd column's code lies 8 bits above the even one's
    return Fp4(codes, scales)


def _magnitude(blocks_RBG: Tensor) -> Tensor:
    """The largest magnitude of each group: without the sign, bits order as their numbers do."""
    bits = torch.int16 if blocks_RBG.dtype.itemsize == 2 else torch.int32
    unsigned = blocks_RBG.view(bits) & torch.iinfo(bits).max
    return unsigned.amax(-1).view(blocks_RBG.dtype)


def e2m1_codes(scaled: Tensor) -> Tensor:
    """The nearest E2M1 code of each float32 number, uint8; beyond 6 the code of 6.

    Codes count steps of 1/2 up to 2, then of 1 up to 4, then of 2. Whichever step is the number's
    own gives the smallest count; ties fall on even counts, as `round` takes them.
    """
    magnitude = scaled.abs()
    codes = (magnitude * 2).round_()
    torch.minimum(codes, magnitude.round().add_(2), out=codes)
    torch.minimum(codes, magnitude.mul_(0.5).round_().add_(4), out=codes)
    # The sum has no negative zero, so that the sign bit says what is below 0.
    signs = (scaled + 0.0).view(torch.int32).bitwise_right_shift_(28).bitwise_and_(8)
    return codes.clamp_(max=7).to(torch.int32).bitwise_or_(signs).to(torch.uint8)


def _rows(tensor: Tensor, columns: int | None = None) -> tuple[Tensor, ...]:
    """Groups of rows of about `_BLOCK_NUMBERS` numbers of a matrix with so many columns."""
    return tensor.split(max(1, _BLOCK_NUMBERS // (columns or tensor.shape[-1])))
