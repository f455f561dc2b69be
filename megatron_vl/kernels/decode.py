"""One token through Mamba-2's recurrence: mamba_ssm's `selective_state_update` in plain torch.

What: moves the state of each sequence on by one token, in place, and returns the output.
Why: decoding needs no chunks, and the published kernel is Triton. What it refuses (ValueError):
heads that do not divide into groups. What it costs: three passes over the state, in place where it
is float32; B and C are broadcast over the heads of their group, not repeated, and where the decay
is one number a head it is computed once, as mamba_ssm's kernel does. Arithmetic is at least
float32.

Shapes: B batch, H heads, P head width, G groups, N state width.
Source: signature of mamba_ssm 2.x, ops/triton/selective_state_update.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor:
    """Advance each state by one token, in place; not differentiable.

    Args:
        state: (B, H, P, N), or without the head dimension (B, P, N); updated in place.
        x: input (B, H, P); without heads (B, P), and likewise below.
        dt: step (B, H, P).
        A: decay rate (H, P, N).
        B, C: (B, G, N); without heads (B, N).
        D: skip weight (H, P).
        z: gate (B, H, P): the output is multiplied by silu(z).
        dt_bias: (H, P).
        dt_softplus: pass dt plus bias through softplus.
        state_batch_indices: rows of `state` that belong to x's rows (B,), if there are more.

    Returns:
        (B, H, P), or (B, P), in x's dtype.

    Raises:
        ValueError: heads do not divide into groups.
    """
    if x.dim() == 2:
        D, z, dt_bias = (None if t is None else t.unsqueeze(-2) for t in (D, z, dt_bias))
        out = selective_state_update(
            state.unsqueeze(1),
            x.unsqueeze(1),
            dt.unsqueeze(1),
            A.unsqueeze(0),
            B.unsqueeze(1),
            C.unsqueeze(1),
            D,
            z,
            dt_bias,
            dt_softplus,
            state_batch_indices,
        )
        return out.squeeze(1)
    heads, groups = x.shape[1], B.shape[1]
    if heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
    dtype = torch.promote_types(x.dtype, torch.float32)
    if _same_within_heads(dt, A, dt_bias):
        dt, A = dt[..., :1], A[..., :1, :1]
        dt_bias = None if dt_bias is None else dt_bias[..., :1]
    rows = state if state_batch_indices is None else state[state_batch_indices.long()]
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    wide = x.to(dtype)
    new = rows.to(dtype)  # the state itself where it has this type
    new.mul_(torch.exp(step[..., None] * A.to(dtype)))
    grouped = new.unflatten(1, (groups, -1))
    scaled = (step * wide).unflatten(1, (groups, -1))
    grouped.addcmul_(scaled[..., None], B.to(dtype)[:, :, None, None])
    if state_batch_indices is not None:
        state[state_batch_indices.long()] = new.to(state.dtype)
    elif new is not state:
        state.copy_(new)
    # One product a group, all its heads side by side.
    out = (grouped.flatten(2, 3) @ C.to(dtype)[..., None]).view(x.shape)
    if D is not None:
        out = out + wide * D.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype)


def _same_within_heads(dt: Tensor, A: Tensor, dt_bias: Tensor | None) -> bool:
    """Whether the decay is one number a head, repeated without a copy, as Mamba-2 has it."""
    strides = [*A.stride()[-2:], dt.stride(-1)]
    strides += [] if dt_bias is None else [dt_bias.stride(-1)]
    return not any(strides)
