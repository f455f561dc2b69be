"""Grouped RMSNorm with a SiLU gate, the norm between Mamba-2's scan and its output projection.

What: `RMSNorm` with the constructor and the call of mamba_ssm's `layernorm_gated.RMSNorm`, and
the function behind it. The channels are normalised group by group, so that groups can live on
different tensor-parallel ranks.

Why: the published one is a Triton kernel. What it refuses (ValueError): channels that do not
divide into groups, a gate of another shape. What it costs: it stores its inputs and one number a
group, and recomputes gate and normalised value backward. Arithmetic is at least float32.

Shapes: ... leading dimensions, D channels, G groups, S group size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _GatedRMSNorm(torch.autograd.Function):
    """norm(x) * silu(z) * weight, or norm(x * silu(z)) * weight; z may be None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        z: Tensor | None,
        eps: float,
        group_size: int,
        norm_before_gate: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(dtype)
        if z is not None and not norm_before_gate:
            wide = F.silu(z.to(dtype)).mul_(wide)
        groups = wide.unflatten(-1, (-1, group_size))
        scale = (groups.square().mean(-1, keepdim=True) + eps).rsqrt_()
        out = (groups * scale).flatten(-2).mul_(weight.to(dtype))
        if z is not None and norm_before_gate:
            out.mul_(F.silu(z.to(dtype)))
        ctx.save_for_backward(x, weight, z, scale)
        ctx.norm_before_gate = norm_before_gate
        return out.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, z, scale = ctx.saved_tensors
        dtype = scale.dtype
        grad, source, wide_weight = grads[0].to(dtype), x.to(dtype), weight.to(dtype)
        gated = z is not None
        gate = F.silu(z.to(dtype)) if gated else torch.ones((), dtype=dtype, device=x.device)
        gate_after = gated and ctx.norm_before_gate
        gate_first = gated and not ctx.norm_before_gate
        inner = source * gate if gate_first else source
        normed = (inner.unflatten(-1, (scale.shape[-2], -1)) * scale).flatten(-2)
        dz = dweight = dx = None
        dgate = grad * normed * wide_weight if gate_after else None
        if gate_after:
            grad = grad * gate
        if ctx.needs_input_grad[1]:
            leading = tuple(range(grad.dim() - 1))
            dweight = (grad * normed).sum(leading).to(weight.dtype)
        dnormed = (grad * wide_weight).unflatten(-1, (scale.shape[-2], -1))
        normed = normed.unflatten(-1, (scale.shape[-2], -1))
        share = (dnormed * normed).mean(-1, keepdim=True)
        dinner = (dnormed - normed * share).mul_(scale).flatten(-2)
        if gate_first:
            dgate = dinner * source
            dinner = dinner.mul_(gate)
        if ctx.needs_input_grad[0]:
            dx = dinner.to(x.dtype)
        if ctx.needs_input_grad[2]:
            dz = torch.ops.aten.silu_backward(dgate, z.to(dtype)).to(z.dtype)
        return dx, dweight, dz, None, None, None


def gated_rms_norm(
    x: Tensor,
    weight: Tensor,
    z: Tensor | None = None,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """RMSNorm of groups of channels, gated by silu(z) after it or before it.

    Args:
        x: input (..., D).
        weight: scale of each channel (D,).
        z: gate (..., D) or None.
        eps: added to the mean square.
        group_size: channels that share one mean square; None takes all D.
        norm_before_gate: True gives norm(x) * silu(z), False norm(x * silu(z)).

    Returns:
        (..., D) in x's dtype, computed in at least float32.

    Raises:
        ValueError: D is not a multiple of `group_size`, or z's shape is not x's.
    """
    size = group_size or x.shape[-1]
    if x.shape[-1] % size:
        raise ValueError(f"{x.shape[-1]} channels do not divide into groups of {size}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"the gate has shape {tuple(z.shape)}, its input {tuple(x.shape)}")
    out: Tensor = _GatedRMSNorm.apply(x, weight, z, eps, size, norm_before_gate)
    return out


class RMSNorm(nn.Module):
    """Grouped RMSNorm with an optional gate; parameter names are mamba_ssm's.

    Args:
        hidden_size: channels D.
        eps: added to the mean square.
        group_size: channels that share one mean square; None takes all D.
        norm_before_gate: True gates the normed value, False norms the gated value.
        device: device of the weight.
        dtype: dtype of the weight.
    """

    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = True,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.group_size = group_size
        self.norm_before_gate = norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Set the weight to one."""
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        """Norm x (..., D), gated by z (..., D) if given; returns x's shape and dtype."""
        return gated_rms_norm(x, self.weight, z, self.eps, self.group_size, self.norm_before_gate)
