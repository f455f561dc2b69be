"""Mamba-2's scan with mamba_ssm's signatures, for machines without its CUDA kernels.

What: `mamba_chunk_scan_combined` and `mamba_split_conv1d_scan_combined`, the two entries that
megatron-core's Mamba layer calls, in plain torch on any device, with exact document resets.

Why: the same model code then runs on a laptop and, with the published kernels, on a cluster; and
these are the reference the published kernels are compared with.

What they refuse (ValueError): shapes that do not fit together, states at document ends
(`return_varlen_states`), a gated MLP riding along in the input projection, unknown activations.
What they assume: A < 0, and finite inputs.

What they cost: see `scan.py`; the activation, gate and norm recompute their cheap parts backward.

Shapes: B batch, L length, H heads, P head width, G groups, N state width, D channels (H * P),
W taps of the convolution, X all projected channels (2 D + 2 G N + H).
Source: Dao and Gu, arXiv 2405.21060; signatures of mamba_ssm 2.x, ops/triton/ssd_combined.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.kernels.conv1d import causal_conv1d_fn
from megatron_vl.kernels.gated_norm import gated_rms_norm
from megatron_vl.kernels.scan import ChunkScan
from megatron_vl.kernels.slabs import useful_chunk

_NO_LIMIT = (0.0, float("inf"))


class _Gate(torch.autograd.Function):
    """y * silu(z) in float32 that stores y and z only."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor) -> Tensor:
        ctx.save_for_backward(y, z)
        dtype = torch.promote_types(y.dtype, torch.float32)
        return F.silu(z.to(dtype)).mul_(y).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        y, z = ctx.saved_tensors
        dtype = torch.promote_types(y.dtype, torch.float32)
        grad, wide = grads[0].to(dtype), z.to(dtype)
        dy = dz = None
        if ctx.needs_input_grad[0]:
            dy = F.silu(wide).mul_(grad).to(y.dtype)
        if ctx.needs_input_grad[1]:
            dz = torch.ops.aten.silu_backward(grad * y, wide).to(z.dtype)
        return dy, dz


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scan sequences with Mamba-2's recurrence; differentiable in every floating input.

    Args:
        x: input (B, L, H, P).
        dt: step before bias, softplus and limit (B, L, H).
        A: decay rate (H,), negative.
        B, C: input and output projections of the state (B, L, G, N); G divides H.
        chunk_size: most tokens of one chunk (see `slabs.useful_chunk`); changes speed and memory,
            results only by rounding.
        D: skip weight (H,) or (H, P).
        z: gate (B, L, H, P): the output is multiplied by silu(z).
        dt_bias: added to dt (H,).
        initial_states: state before the first token (B, H, P, N), of its document only.
        seq_idx: document number of each token (B, L); the state restarts where it changes. A
            number must not come back after another one.
        cu_seqlens: accepted and not needed; `seq_idx` says the same.
        dt_softplus: pass dt through softplus.
        dt_limit: dt is clamped to this range; its lower end is at least 0.
        return_final_states: also return the state after the last token.

    Returns:
        y (B, L, H, P) in x's dtype; with `return_final_states` also the final state (B, H, P, N)
        in float32.

    Raises:
        ValueError: shapes do not fit, the lower limit of dt is negative, or
            `return_varlen_states` is set.
    """
    if return_varlen_states:
        raise ValueError("states at document ends are not computed: scan the documents one by one")
    _check_scan(x, dt, A, B, C, chunk_size, D, z, initial_states, seq_idx, dt_limit)
    dtype = torch.promote_types(x.dtype, torch.float32)
    step = dt.to(dtype)
    if dt_bias is not None:
        step = step + dt_bias.to(dtype)
    if dt_softplus:
        step = F.softplus(step)
    if dt_limit != _NO_LIMIT or not dt_softplus:
        step = step.clamp(*dt_limit)
    block = useful_chunk(chunk_size, x.shape[3], B.shape[3])
    skip = D[:, None] if D is not None and D.dim() == 1 else D
    y, final = ChunkScan.apply(
        x, step, step * A.to(dtype), B, C, skip, initial_states, seq_idx, block
    )
    if z is not None:
        y = _Gate.apply(y, z)
    return (y, final) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor | None = None,
    chunk_size: int = 128,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = _NO_LIMIT,
    return_final_states: bool = False,
    activation: str | None = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """Mamba-2 between its two projections: split, convolve, scan, gate, and norm if asked.

    Without `rmsnorm_weight` the output is y * silu(z), as megatron-core's layer wants it (it norms
    afterwards); with it, the grouped RMSNorm of y and z (see `gated_norm.py`).

    Args:
        zxbcdt: projected input (B, L, X): z, x, B, C, dt side by side.
        conv1d_weight: taps of the convolution over x, B and C (D + 2 G N, W).
        conv1d_bias: its bias (D + 2 G N,).
        dt_bias: added to dt before softplus (H,).
        A: decay rate (H,), negative.
        D: skip weight (H,) with `headdim`, or (H, P).
        activation: after the convolution: "silu", "swish" or None.
        rmsnorm_weight: (D,); its groups are the scan's.
        outproj_weight, outproj_bias: (O, D) and (O,), applied last.
        ngroups: groups that share B and C.

    The other arguments are those of `mamba_chunk_scan_combined`.

    Returns:
        (B, L, D), or (B, L, O) with `outproj_weight`; with `return_final_states` also the final
        state (B, H, P, N) in float32.

    Raises:
        ValueError: shapes do not fit together.
    """
    heads = A.shape[0]
    if D is not None and D.dim() == 2:
        headdim = D.shape[1]
    if headdim is None:
        raise ValueError("headdim is needed unless D has shape (heads, headdim)")
    inner, conv_width = heads * headdim, conv1d_weight.shape[0]
    if zxbcdt.shape[-1] != inner + conv_width + heads:
        raise ValueError(
            f"zxbcdt has {zxbcdt.shape[-1]} channels, z, convolution and dt take {inner} + "
            f"{conv_width} + {heads}: a gated MLP in the same projection is not supported"
        )
    if conv_width <= inner or (conv_width - inner) % (2 * ngroups):
        raise ValueError(
            f"the convolution has {conv_width} channels: x takes {inner}, the rest must split into "
            f"B and C of {ngroups} groups"
        )
    if outproj_weight is None and outproj_bias is not None:
        raise ValueError("outproj_bias was given without outproj_weight")
    z, xBC, dt = zxbcdt.split([inner, conv_width, heads], dim=-1)
    convolved = causal_conv1d_fn(
        xBC.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation=activation
    )
    assert isinstance(convolved, Tensor)  # a pair only where final states are asked for
    shared = (conv_width - inner) // 2
    x, B, C = convolved.transpose(1, 2).split([inner, shared, shared], dim=-1)
    gate_in_scan = rmsnorm_weight is None
    y, final = mamba_chunk_scan_combined(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        chunk_size,
        D=D,
        z=z.unflatten(-1, (heads, headdim)) if gate_in_scan else None,
        dt_bias=dt_bias,
        initial_states=initial_states,
        seq_idx=seq_idx,
        dt_softplus=True,
        dt_limit=dt_limit,
        return_final_states=True,
    )
    out = y.flatten(2)
    if rmsnorm_weight is not None:
        out = gated_rms_norm(
            out, rmsnorm_weight, z, rmsnorm_eps, inner // ngroups, norm_before_gate
        )
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    return (out, final) if return_final_states else out


def _check_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None,
    z: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
    dt_limit: tuple[float, float],
) -> None:
    if x.dim() != 4 or B.dim() != 4:
        raise ValueError(f"x is (b, l, h, p) and B (b, l, g, n), got {x.shape} and {B.shape}")
    batch, length, heads, head_dim = x.shape
    groups, state_dim = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"{heads} heads do not divide into {groups} groups")
    if chunk_size < 1 or length < 1:
        raise ValueError(f"chunk size {chunk_size} and length {length} must be at least 1")
    if dt_limit[0] < 0:
        raise ValueError(f"dt must not be negative: the lower limit {dt_limit[0]} must be >= 0")
    skips = [(heads,), (heads, head_dim)]
    wanted: list[tuple[str, Tensor | None, list[tuple[int, ...]]]] = [
        ("dt", dt, [(batch, length, heads)]),
        ("A", A, [(heads,)]),
        ("B", B, [(batch, length, groups, state_dim)]),
        ("C", C, [(batch, length, groups, state_dim)]),
        ("D", D, skips),
        ("z", z, [(batch, length, heads, head_dim)]),
        ("initial_states", initial_states, [(batch, heads, head_dim, state_dim)]),
        ("seq_idx", seq_idx, [(batch, length)]),
    ]
    for name, tensor, shapes in wanted:
        if tensor is not None and tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {shapes[-1]}")
