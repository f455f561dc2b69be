"""Gradients through fake quantization: as if the rounding were not there.

The gradient of a number beyond its tensor's amax, which saturates, is zero; of all others it is the
gradient of what it became. Costs a byte a number between the passes.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Fake = Callable[..., Tensor]
"""From numbers, their amax and perhaps a type to the nearest numbers of a format, as
`nvfp4.fake_nvfp4`."""


def straight_through(x_RK: Tensor, amax: Tensor, fake: Fake) -> Tensor:
    """Fake-quantized `x_RK` in its own type, with the clipped gradient of the module docstring.

    Args:
        amax: 0-dim, the largest magnitude that does not saturate.
    """
    return _StraightThrough.apply(x_RK, amax, fake)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RK: Tensor, amax: Tensor, fake: Fake) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(x_RK.abs() <= amax)
        return fake(x_RK, amax)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (inside_RK,) = ctx.saved_tensors
        return grads[0] * inside_RK, None, None


def stand_in(weight: Tensor, values: Tensor) -> Tensor:
    """`values` for a weight they were made from; their gradient is the weight's."""
    return _StandIn.apply(weight, values)


class _StandIn(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
