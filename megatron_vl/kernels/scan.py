"""The chunked state-space dual (SSD) scan and its hand-written backward, in plain torch.

What: y_t = H_t C_t + D x_t with H_t = exp(dt_t A) H_(t-1) + (dt_t x_t) outer B_t, per head,
computed chunk by chunk: inside a chunk as masked matrix products, between chunks by passing one
state. B and C are shared by the heads of a group; products that involve them run once a group,
over all its heads side by side, so they are never repeated to heads.

Why: Mamba-2's published kernels need CUDA and Triton, subtract decay sums across documents and
accumulate gradients with atomics. Here the decay sums restart at every document start, so that
document A cannot move a bit of document B, and the same inputs give the same gradients, bitwise.

What it refuses: nothing of its own; `ssd.py` checks shapes. Inputs must be finite: a document's
infinities or NaNs reach its neighbours in the same chunk (zero times infinity).

What it costs: time and memory linear in the length. Work goes slab by slab (see `slabs.py`), so
that the Q x Q x heads matrices are transient; forward keeps one state a chunk (N/Q of the size of
x), backward recomputes everything else. Without autograd no state is kept. There is no
host-device synchronisation. All arithmetic is float32, or float64 for float64 inputs.

Shapes: B batch, L length, H heads, P head width, G groups, R heads a group, N state width,
K chunks of a slab, Q chunk length, T and U positions in a chunk (target and source), S = R * P.
"""

from typing import Any

import torch
from torch import Tensor

from megatron_vl.kernels.slabs import Groups, Ids, Slab, decays, plan_chunks, plan_slabs, within


class ChunkScan(torch.autograd.Function):
    """Differentiable scan over packed documents.

    `apply(x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP, start_BHPN, seq_idx_BL, chunk_size)`
    returns `(y_BLHP, final_BHPN)`: y in x's dtype, the state after the last token in dt's dtype.
    dt >= 0 is the step, log <= 0 the log decay dt * A, both in the dtype of the arithmetic. D_HP is
    (H, P) or (H, 1). `start_BHPN` enters the first token's document. D, start and seq_idx may be
    None. Source: Dao and Gu, arXiv 2405.21060, section 6.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_BLHP: Tensor,
        dt_BLH: Tensor,
        log_BLH: Tensor,
        B_BLGN: Tensor,
        C_BLGN: Tensor,
        D_HP: Tensor | None,
        start_BHPN: Tensor | None,
        seq_idx_BL: Tensor | None,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        """Scan all slabs; keep the state that enters each chunk if a gradient will be asked for."""
        ctx.set_materialize_grads(False)
        batch, length, heads, head_dim = x_BLHP.shape
        groups, state_dim = B_BLGN.shape[2:]
        num_groups, num_chunks = plan_slabs(x_BLHP, groups, chunk_size)
        ids = _ids(seq_idx_BL)
        keep = any(ctx.needs_input_grad)
        slots = -(-length // chunk_size) if keep else num_chunks
        y_BLHP = torch.empty_like(x_BLHP, memory_format=torch.contiguous_format)
        final_BHPN = dt_BLH.new_empty(batch, heads, head_dim, state_dim)
        inputs = (x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP)
        kept = []
        for first in range(0, groups, num_groups):
            part = Groups(first, num_groups, heads // groups)
            shape = (slots + 1, batch, num_groups, state_dim, part.repeats * head_dim)
            states = dt_BLH.new_empty(shape)  # slot i enters chunk i
            if start_BHPN is None:
                states[0].zero_()
            else:
                part.state(states[0]).copy_(part.heads(start_BHPN, 1))
            for chunks in plan_chunks(length, chunk_size, num_chunks):
                slab = Slab(chunks, part, dt_BLH.dtype)
                offset = chunks.index if keep else 0
                mine = states[offset : offset + chunks.count + 1]
                _forward_slab(slab, inputs, ids, mine, y_BLHP)
                if not keep:
                    states[0].copy_(mine[-1])
            part.heads(final_BHPN, 1).copy_(part.state(states[slots if keep else 0]))
            kept.append(states)
        if keep:
            ctx.save_for_backward(*inputs, seq_idx_BL, *kept)
        ctx.plan = (chunk_size, num_chunks)
        return y_BLHP, final_BHPN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of x, dt, log, B, C, D and the initial state; D's only if it is asked for."""
        dy_BLHP, dfinal_BHPN = grads
        x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP, seq_idx_BL, *kept = ctx.saved_tensors
        chunk_size, num_chunks = ctx.plan
        _, length, heads, _ = x_BLHP.shape
        groups = B_BLGN.shape[2]
        num_groups = groups // len(kept)
        ids = _ids(seq_idx_BL)
        if dy_BLHP is None:
            dy_BLHP = torch.zeros_like(x_BLHP)
        dx, ddt, dlog, dB, dC = (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            for t in (x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN)
        )
        dD = None
        if ctx.needs_input_grad[5]:
            dD = torch.zeros_like(D_HP, dtype=dt_BLH.dtype)
        dstart = None
        if ctx.needs_input_grad[6]:
            dstart = dt_BLH.new_empty(x_BLHP.shape[0], *x_BLHP.shape[2:], B_BLGN.shape[3])
        for number, states in enumerate(kept):
            part = Groups(number * num_groups, num_groups, heads // groups)
            dstates = torch.empty_like(states[: num_chunks + 1])
            if dfinal_BHPN is None:
                dstates[0].zero_()
            else:
                part.state(dstates[0]).copy_(part.heads(dfinal_BHPN, 1))
            for chunks in reversed(list(plan_chunks(length, chunk_size, num_chunks))):
                slab = Slab(chunks, part, dt_BLH.dtype)
                dmine = dstates[: chunks.count + 1]
                dmine[-1].copy_(dstates[0])
                mine = states[chunks.index : chunks.index + chunks.count]
                inputs = (x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP)
                _backward_slab(slab, inputs, ids, mine, dy_BLHP, dmine, (dx, ddt, dlog, dB, dC, dD))
            if dstart is not None:
                part.heads(dstart, 1).copy_(part.state(dstates[0]))
        return dx, ddt, dlog, dB, dC, dD, dstart, None, None


def _ids(seq_idx_BL: Tensor | None) -> Ids | None:
    if seq_idx_BL is None:
        return None
    # An initial state belongs to the first token's document: it is its own predecessor.
    return Ids(seq_idx_BL, torch.cat([seq_idx_BL[:, :1], seq_idx_BL[:, :-1]], dim=1))


def _forward_slab(
    slab: Slab,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    ids: Ids | None,
    states: Tensor,
    y_BLHP: Tensor,
) -> None:
    """Fill y of one slab and states[1:] from states[0]."""
    x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP = inputs
    decay = decays(slab, dt_BLH, log_BLH, ids)
    step, leave = decay.step_KBGRQ, decay.leave_KBGRQ
    x, y = slab.view(x_BLHP), slab.view(y_BLHP)
    B_MQN, C_MQN = slab.shared(B_BLGN), slab.shared(C_BLGN)
    score, ratio = within(decay, B_MQN, C_MQN)
    mixed = torch.bmm(ratio.mul_(score[:, :, :, None]).flatten(0, 3), slab.by_head(x, step))

    torch.bmm(B_MQN.transpose(1, 2), slab.by_group(x, step * leave), out=states[1:].flatten(0, 2))
    split = states.unflatten(-1, (slab.groups.repeats, -1)).unbind()
    keep = decay.keep_KBGR[:, :, :, None, :, None].unbind()
    for before, after, weight in zip(split[:-1], split[1:], keep, strict=True):
        after.addcmul_(before, weight)
    carried = torch.bmm(C_MQN, states[:-1].flatten(0, 2))

    within_view, carried_view = slab.from_heads(mixed), slab.from_groups(carried)
    enter = decay.enter_KBGRQ.permute(0, 1, 4, 2, 3)[..., None]
    total = within_view.addcmul_(carried_view, enter)
    if D_HP is None:
        y.copy_(total)
    else:
        y.copy_(total.addcmul_(x.to(slab.dtype), slab.groups.heads(D_HP, 0).to(slab.dtype)))


def _backward_slab(
    slab: Slab,
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    ids: Ids | None,
    states: Tensor,
    dy_BLHP: Tensor,
    dstates: Tensor,
    grads: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
) -> None:
    """Fill one slab's gradients and dstates[:-1] from dstates[-1]; add to dD."""
    x_BLHP, dt_BLH, log_BLH, B_BLGN, C_BLGN, D_HP = inputs
    dx_BLHP, ddt_BLH, dlog_BLH, dB_BLGN, dC_BLGN, dD_HP = grads
    decay = decays(slab, dt_BLH, log_BLH, ids)
    step, leave = decay.step_KBGRQ, decay.leave_KBGRQ
    x, dy = slab.view(x_BLHP), slab.view(dy_BLHP)
    B_MQN, C_MQN = slab.shared(B_BLGN), slab.shared(C_BLGN)
    score, ratio = within(decay, B_MQN, C_MQN)

    # Inside the chunks: y = (score * ratio) (x dt).
    dy_heads = slab.by_head(dy, None)
    dmix = torch.bmm(dy_heads, slab.by_head(x, step).transpose(1, 2))
    dmix = dmix.unflatten(0, ratio.shape[:4]).mul_(ratio)
    dscore = dmix.sum(3).mul_(decay.visible_KBTU[:, :, None]).flatten(0, 2)
    mix = ratio.mul_(score[:, :, :, None]).flatten(0, 3)
    dscaled = slab.from_heads(torch.bmm(mix.transpose(1, 2), dy_heads))
    # A token's pair with itself has no decay; leaving it out keeps its rounding out of dlog.
    pairs = dmix.mul_(score.tril(-1)[:, :, :, None])
    along = pairs.sum(-1).sub_(pairs.sum(-2))
    del ratio, mix, dmix, pairs, dy_heads

    # Through the states, last chunk first: dstates[i + 1] belongs to the state leaving chunk i.
    dy_groups = slab.by_group(dy, decay.enter_KBGRQ)
    torch.bmm(C_MQN.transpose(1, 2), dy_groups, out=dstates[:-1].flatten(0, 2))
    split = dstates.unflatten(-1, (slab.groups.repeats, -1)).unbind()[::-1]
    keep = decay.keep_KBGR[:, :, :, None, :, None].unbind()[::-1]
    for dafter, dbefore, weight in zip(split[:-1], split[1:], keep, strict=True):
        dbefore.addcmul_(dafter, weight)
    entering, dleaving = states.flatten(0, 2), dstates[1:].flatten(0, 2)
    shared = (states * dstates[1:]).unflatten(-1, (slab.groups.repeats, -1))
    kept = shared.sum((3, 5)) * decay.keep_KBGR
    carried = torch.bmm(C_MQN, entering).mul_(dy_groups)
    along += slab.from_groups(carried).sum(-1).permute(0, 1, 3, 4, 2)
    stored = slab.from_groups(torch.bmm(B_MQN, dleaving))
    stored.mul_(leave.permute(0, 1, 4, 2, 3)[..., None])
    dropped = (stored * x).sum(-1).permute(0, 1, 3, 4, 2) * step

    # A log decay at t acts on every pair with source before t and target at or after t.
    at_or_after = decay.visible_KBTU.double()
    before = at_or_after.tril(-1).transpose(-1, -2)
    dlog = along.double().flatten(2, 3) @ at_or_after + dropped.double().flatten(2, 3) @ before
    dlog = dlog.unflatten(2, along.shape[2:4]) + kept[..., None]
    slab.last(dlog_BLH).copy_(dlog)

    dscaled.add_(stored)
    slab.view(ddt_BLH).copy_((dscaled * x).sum(-1))
    dx = dscaled.mul_(step.permute(0, 1, 4, 2, 3)[..., None])
    if D_HP is not None:
        dx.addcmul_(dy.to(slab.dtype), slab.groups.heads(D_HP, 0).to(slab.dtype))
    slab.view(dx_BLHP).copy_(dx)
    if dD_HP is not None:
        part = (dy.to(slab.dtype) * x).sum((0, 1, 2))
        part = part.sum(-1, keepdim=True) if dD_HP.shape[1] == 1 else part
        slab.groups.heads(dD_HP, 0).add_(part)
    dC = torch.bmm(dscore, B_MQN).baddbmm_(dy_groups, entering.transpose(1, 2))
    dB = torch.bmm(dscore.transpose(1, 2), C_MQN)
    dB.baddbmm_(slab.by_group(x, step * leave), dleaving.transpose(1, 2))
    slab.store_shared(dC, dC_BLGN)
    slab.store_shared(dB, dB_BLGN)
