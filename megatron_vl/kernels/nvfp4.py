"""Fake quantization: NVFP4 numbers held in an ordinary floating type.

A number is code * block scale * tensor scale, where codes are E2M1, 16 numbers of a row share an
E4M3 block scale, made from their own amax, and a tensor has one float32 scale, amax / (6 * 448).
All roundings are to nearest, ties to even; all arithmetic is float32.

Why: a student that multiplies these numbers computes what the released weights compute, on any
device; for its gradient see `straight_through`.

Nothing is refused; an infinite number or a NaN makes its block NaN, so that it reaches the loss
instead of saturating. Costs about a dozen passes over the numbers.

Source: NVIDIA's Model Optimizer, whose emulation this repeats bit for bit; an export quantizes to
the same values.

Shapes: R rows, K columns (a multiple of 16 in NVFP4), B blocks of a row, G numbers of a block.
"""

import torch
from torch import Tensor

E2M1_LARGEST = 6.0
E4M3_LARGEST = 448.0
E4M3_SMALLEST = 2.0**-9
BLOCK = 16
"""Numbers that share a block scale."""
_EXPONENT = 0x7F800000
_SMALLEST_AMAX = torch.finfo(torch.float32).tiny
_ROW_GROUP = 1 << 18
"""Numbers worked on at a time on the CPU: what its cache holds."""


def fake_nvfp4(x_RK: Tensor, amax: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The NVFP4 numbers nearest to `x_RK`.

    Args:
        x_RK: any float type and any number of leading axes.
        amax: 0-dim, the largest magnitude that does not saturate.
        dtype: of the result; that of `x_RK` when None.
    """
    scale = amax.float().clamp(min=_SMALLEST_AMAX) / (E2M1_LARGEST * E4M3_LARGEST)
    dtype = dtype or x_RK.dtype
    if x_RK.device.type != "cpu" or x_RK.numel() <= _ROW_GROUP:
        return _some_rows(x_RK, scale).to(dtype)
    rows_RK = x_RK.reshape(-1, x_RK.shape[-1])
    made_RK = torch.empty(rows_RK.shape, dtype=dtype)
    count = max(1, _ROW_GROUP // rows_RK.shape[1])
    for rows, made in zip(rows_RK.split(count), made_RK.split(count), strict=True):
        made.copy_(_some_rows(rows, scale))
    return made_RK.view(x_RK.shape)


def _some_rows(x_RK: Tensor, scale: Tensor) -> Tensor:
    x_RBG = x_RK.float().unflatten(-1, (-1, BLOCK))
    largest_RB = x_RBG.abs().amax(-1)
    wanted_RB = largest_RB / (E2M1_LARGEST * scale)
    wanted_RB = torch.where(wanted_RB == 0, 1.0, wanted_RB).clamp_(E4M3_SMALLEST, E4M3_LARGEST)
    steps_RB = wanted_RB.to(torch.float8_e4m3fn).float() * scale
    steps_RB = torch.where(largest_RB.isfinite(), steps_RB, torch.nan)
    scaled_RBG = x_RBG / steps_RB.unsqueeze(-1)
    # The distance of two codes: 0.5 below 2, 1 below 4, then 2; a power of two, so exact.
    powers = scaled_RBG.view(torch.int32).bitwise_and(_EXPONENT).view(torch.float32)
    distance_RBG = powers.clamp_(1, 4).mul_(0.5)
    codes_RBG = scaled_RBG.div_(distance_RBG).round_().mul_(distance_RBG)
    return codes_RBG.clamp_(-E2M1_LARGEST, E2M1_LARGEST).mul_(steps_RB.unsqueeze(-1)).flatten(-2)
