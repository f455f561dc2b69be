"""Causal depthwise convolution over time, with document resets: causal_conv1d's calls in torch.

What: `causal_conv1d_fn` for whole sequences (differentiable) and `causal_conv1d_update` for
decoding. With `seq_idx` no tap reaches into another document: its contribution is an exact zero.

Why: the published kernels need CUDA. What they refuse (ValueError): activations other than SiLU,
`seq_idx` together with states, circular decoding buffers.

What it costs: W multiply-adds a channel and token, block by block of time so that temporaries stay
in cache; backward stores the input only and recomputes the value before the activation. Time and
memory are linear in the length. Tensors whose channels are contiguous, (B, L, D) transposed, are
read and written as such. Arithmetic is at least float32.

Shapes: B batch, D channels, L length, W taps, T tokens of a block.
Source: signatures of causal_conv1d 1.5, causal_conv1d_interface.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_BLOCK_ELEMENTS = {"cpu": 1 << 17}
"""Elements of one block of time by device type; a few such temporaries should stay in L2 cache."""
_BLOCK_ELEMENTS_DEFAULT = 1 << 26


def _check_activation(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation is None, silu or swish, not {activation!r}")
    return activation is not None


def _shifted(x_BDL: Tensor, seq_idx_BL: Tensor | None, start: int, stop: int, lag: int) -> Tensor:
    """x `lag` tokens before [start, stop), from `lag` on; zero where that is another document."""
    first = max(start, lag)
    part = x_BDL[:, :, first - lag : stop - lag]
    if seq_idx_BL is None or lag == 0:
        return part
    same = seq_idx_BL[:, first:stop] == seq_idx_BL[:, first - lag : stop - lag]
    return part * same[:, None].to(part.dtype)


def _convolve(
    x_BDL: Tensor,
    weight_DW: Tensor,
    bias_D: Tensor | None,
    seq_idx_BL: Tensor | None,
    start: int,
    stop: int,
) -> tuple[Tensor, list[Tensor]]:
    """Tokens [start, stop) before the activation, and the shifted inputs of each lag."""
    taps = weight_DW.shape[1]
    inputs = [_shifted(x_BDL, seq_idx_BL, start, stop, lag) for lag in range(min(taps, stop))]
    out = inputs[0] * weight_DW[:, -1:]
    if bias_D is not None:
        out += bias_D[:, None]
    for lag, part in enumerate(inputs[1:], 1):
        length = part.shape[2]
        if length:
            out[:, :, out.shape[2] - length :].addcmul_(
                part.to(out.dtype), weight_DW[:, taps - 1 - lag, None]
            )
    return out, inputs


class _CausalConv(torch.autograd.Function):
    """Convolution, bias and activation; see `causal_conv1d_fn`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_BDL: Tensor,
        weight_DW: Tensor,
        bias_D: Tensor | None,
        seq_idx_BL: Tensor | None,
        activate: bool,
    ) -> Tensor:
        dtype = torch.promote_types(x_BDL.dtype, torch.float32)
        weight, bias = weight_DW.to(dtype), None if bias_D is None else bias_D.to(dtype)
        out = torch.empty_like(x_BDL)
        for start, stop in _blocks(x_BDL):
            part, _ = _convolve(x_BDL, weight, bias, seq_idx_BL, start, stop)
            out[:, :, start:stop].copy_(F.silu(part, inplace=True) if activate else part)
        ctx.save_for_backward(x_BDL, weight_DW, bias_D, seq_idx_BL)
        ctx.activate = activate
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BDL, weight_DW, bias_D, seq_idx_BL = ctx.saved_tensors
        dtype = torch.promote_types(x_BDL.dtype, torch.float32)
        weight, bias = weight_DW.to(dtype), None if bias_D is None else bias_D.to(dtype)
        taps, length = weight.shape[1], x_BDL.shape[2]
        dx = torch.empty_like(x_BDL) if ctx.needs_input_grad[0] else None
        dweight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        dbias = torch.zeros_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
        for start, stop in _blocks(x_BDL):
            # The last taps - 1 inputs of a block act on the next one: recompute that far.
            reach = min(stop + taps - 1, length)
            dpre = grads[0][:, :, start:reach].to(dtype)
            inputs: list[Tensor] = []
            if ctx.activate or dweight is not None:
                pre, inputs = _convolve(x_BDL, weight, bias, seq_idx_BL, start, reach)
                if ctx.activate:
                    dpre = torch.ops.aten.silu_backward(dpre, pre)
            mine = dpre[:, :, : stop - start]
            if dbias is not None:
                dbias += mine.sum((0, 2))
            if dweight is not None:
                for lag, part in enumerate(inputs):
                    # `part` begins at token max(start, lag) and ends at `reach`.
                    count = max(0, stop - max(start, lag))
                    ours = mine[:, :, mine.shape[2] - count :]
                    dweight[:, taps - 1 - lag] += (ours * part[:, :, :count]).sum((0, 2))
            if dx is not None:
                total = mine * weight[:, -1:]
                for lag in range(1, min(taps, reach - start)):
                    later = _later(dpre, seq_idx_BL, start, stop, lag)
                    total[:, :, : later.shape[2]].addcmul_(later, weight[:, taps - 1 - lag, None])
                dx[:, :, start:stop].copy_(total)
        return (
            dx,
            dweight.to(weight_DW.dtype) if dweight is not None else None,
            dbias.to(bias_D.dtype) if dbias is not None else None,
            None,
            None,
        )


def _later(dpre_BDT: Tensor, seq_idx_BL: Tensor | None, start: int, stop: int, lag: int) -> Tensor:
    """Gradient `lag` tokens after [start, stop), zero where that is another document."""
    part = dpre_BDT[:, :, lag : stop - start + lag]
    if seq_idx_BL is None:
        return part
    end = start + part.shape[2]
    same = seq_idx_BL[:, start:end] == seq_idx_BL[:, start + lag : end + lag]
    return part * same[:, None].to(part.dtype)


def _blocks(x_BDL: Tensor) -> list[tuple[int, int]]:
    batch, channels, length = x_BDL.shape
    budget = _BLOCK_ELEMENTS.get(x_BDL.device.type, _BLOCK_ELEMENTS_DEFAULT)
    size = max(16, budget // (batch * channels))
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Convolve each channel with its own causal taps; differentiable in the first three arguments.

    Args:
        x: input (B, D, L).
        weight: taps (D, W), the last one acts on the present token.
        bias: (D,).
        seq_idx: document number of each token (B, L); taps see equal numbers only.
        initial_states: the W - 1 tokens before x (B, D, W - 1); zeros if None.
        return_final_states: also return the last W - 1 tokens.
        final_states_out: tensor (B, D, W - 1) to write them to.
        activation: None, "silu" or "swish".

    Returns:
        (B, D, L) in x's dtype, with `return_final_states` also (B, D, W - 1).

    Raises:
        ValueError: shapes do not fit, or `seq_idx` is combined with initial or final states.
    """
    activate = _check_activation(activation)
    batch, channels, length = x.shape
    if weight.dim() != 2 or weight.shape[0] != channels:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, x has {channels} channels")
    lead = weight.shape[1] - 1
    if seq_idx is not None:
        if initial_states is not None or return_final_states:
            raise ValueError("states at the ends of a sequence exist without seq_idx only")
        if tuple(seq_idx.shape) != (batch, length):
            raise ValueError(
                f"seq_idx has shape {tuple(seq_idx.shape)}, expected {(batch, length)}"
            )
    if initial_states is not None:
        if tuple(initial_states.shape) != (batch, channels, lead):
            raise ValueError(
                f"initial_states has shape {tuple(initial_states.shape)}, expected "
                f"{(batch, channels, lead)}"
            )
        x = torch.cat([initial_states.to(x.dtype), x], dim=2)
    out: Tensor = _CausalConv.apply(x, weight, bias, seq_idx, activate)
    out = out[:, :, x.shape[2] - length :]
    if not return_final_states:
        return out
    final = F.pad(x, (lead - x.shape[2], 0))
    if final_states_out is not None:
        final = final_states_out.copy_(final)
    return out, final


@torch.no_grad()
def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next token or tokens and move the state on, in place; not differentiable.

    Args:
        x: (B, D) or (B, D, L).
        conv_state: last inputs (B, D, S) with S >= W - 1, newest last; updated in place.
        weight: taps (D, W).
        bias: (D,).
        activation: None, "silu" or "swish".
        cache_seqlens: must be None; the state is not a ring buffer.
        conv_state_indices: rows of `conv_state` that belong to x's rows (B,), if there are more.

    Returns:
        Like x.

    Raises:
        ValueError: the state is shorter than W - 1, or `cache_seqlens` is given.
    """
    activate = _check_activation(activation)
    if cache_seqlens is not None:
        raise ValueError("ring-buffer states (cache_seqlens) are not supported")
    taps, slots = weight.shape[1], conv_state.shape[-1]
    if slots < taps - 1:
        raise ValueError(f"conv_state holds {slots} tokens, {taps} taps need {taps - 1}")
    tokens = x[..., None] if x.dim() == 2 else x
    if tokens.shape[-1] == 1 and slots >= taps and conv_state_indices is None:
        out = _next_output(tokens, conv_state, weight, bias)
        out = (F.silu(out) if activate else out).to(x.dtype)
        return out if x.dim() == 2 else out[..., None]
    rows = conv_state if conv_state_indices is None else conv_state[conv_state_indices.long()]
    seen = torch.cat([rows, tokens.to(rows.dtype)], dim=-1)
    if conv_state_indices is None:
        conv_state.copy_(seen[..., -slots:])
    else:
        conv_state[conv_state_indices.long()] = seen[..., -slots:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    windows = seen[..., slots - taps + 1 :].to(dtype) if slots >= taps else seen.to(dtype)
    windows = windows.unfold(-1, taps, 1)
    out = (windows * weight.to(dtype)[:, None]).sum(-1)
    if bias is not None:
        out += bias.to(dtype)[:, None]
    out = (F.silu(out) if activate else out).to(x.dtype)
    return out[..., 0] if x.dim() == 2 else out


def _next_output(
    token_BD1: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """One token, the common step of decoding, in a third of the general way's operations: (B, D)
    before the activation, at least float32; the state moves on."""
    seen = [conv_state[..., 1:], token_BD1.to(conv_state.dtype)]
    conv_state.copy_(torch.cat(seen, dim=-1))
    dtype = torch.promote_types(token_BD1.dtype, torch.float32)
    windows = conv_state[..., -weight.shape[1] :].to(dtype)
    out = (windows * weight.to(dtype)).sum(-1)
    return out if bias is None else out + bias.to(dtype)
