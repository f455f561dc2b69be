"""Fake quantization: FP8 numbers with one scale a tensor, held in an ordinary floating type.

A number is byte * scale, where bytes are E4M3 and the scale is the tensor's amax / 448, not rounded
to a power of two as the scales of FP8 training are (`kernels.fp8`). The quotient has the type of
the numbers; the rounding is to nearest, ties to even.

Why: see `nvfp4`. Nothing is refused; what exceeds the amax saturates, but an infinite number or a
NaN becomes NaN, so that it reaches the loss. Costs half a dozen passes over the numbers.

Source: NVIDIA's Model Optimizer, whose static FP8 this repeats; an export quantizes to the same
values.

Shapes: R rows, K columns.
"""

import torch
from torch import Tensor

from megatron_vl.kernels.fp8 import E4M3, LARGEST, decode

_SMALLEST_AMAX = torch.finfo(torch.float32).tiny


def fake_fp8(x_RK: Tensor, amax: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The FP8 numbers nearest to `x_RK`.

    Args:
        x_RK: any float type and any shape.
        amax: 0-dim, the largest magnitude that does not saturate.
        dtype: of the result; that of `x_RK` when None.
    """
    scale = amax.float().clamp(min=_SMALLEST_AMAX) / LARGEST[E4M3]
    scaled_RK = (x_RK / scale).to(x_RK.dtype)
    bytes_RK = scaled_RK.clamp(-LARGEST[E4M3], LARGEST[E4M3]).to(E4M3)
    values_RK = decode(bytes_RK) * scale
    return torch.where(x_RK.isfinite(), values_RK, torch.nan).to(dtype or x_RK.dtype)
