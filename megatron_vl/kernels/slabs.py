"""How the SSD scan cuts a sequence: chunks, slabs, document masks and decays.

What: plans slabs (some chunks of some groups, whose decay matrices fit a cache), cuts views of the
inputs into the two layouts the matrix products want, and builds the decays of a slab.

Why here: forward and backward of `scan.py` share all of it, and the rule that decay sums restart
at document starts lives in one function, `decays`.

What it refuses: nothing; `ssd.py` checks shapes. What it costs: masks and decay sums are 1/H and
1/P of the scan's own work; no host-device synchronisation.

Shapes: B batch, L length, H heads, P head width, G groups, R heads a group, N state width,
K chunks of a slab, Q chunk length, T and U positions in a chunk (target and source).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_SLAB_ELEMENTS = {"cpu": 1 << 18}
"""Elements of one slab's decay matrices by device type; on a CPU they should stay in L2 cache."""
_SLAB_ELEMENTS_DEFAULT = 1 << 26
"""The same for every other device: enough work a kernel launch, 256 MiB in float32."""

_LEAST_CHUNK = 32
"""Chunks are not halved below this length: launches would cost more than they save."""


@dataclass(frozen=True)
class Chunks:
    """Some whole chunks of the sequence, or its shorter last one."""

    start: int
    count: int
    width: int
    index: int

    def cut(self, tensor_BLX: Tensor) -> Tensor:
        """View of (batch, length, ...) as (count, batch, width, ...)."""
        rows = tensor_BLX[:, self.start : self.start + self.count * self.width]
        return rows.unflatten(1, (self.count, self.width)).transpose(0, 1)


class Ids(NamedTuple):
    """Document numbers of the tokens and of their predecessors; equal means same document."""

    here_BL: Tensor
    before_BL: Tensor


class Decay(NamedTuple):
    """Decays inside the chunks of a slab; every exponent is a sum over one document only."""

    visible_KBTU: Tensor  # bool: same document and source not after target
    step_KBGRQ: Tensor  # dt
    sum_KBGRQ: Tensor  # log decay since the chunk's or the document's start
    enter_KBGRQ: Tensor  # weight of the incoming state in the output
    leave_KBGRQ: Tensor  # weight of a token in the outgoing state
    keep_KBGR: Tensor  # weight of the incoming state in the outgoing one


def useful_chunk(chunk_size: int, head_dim: int, state_dim: int) -> int:
    """The chunk length to work with: `chunk_size`, halved while that saves work.

    Per token, the decay matrix has Q elements and the states handed on have P * N / Q, so chunks
    longer than the square root of a state's size only cost. Measured on one CPU core: 32 is about
    a tenth faster than 64 at P = N = 32, and 128 faster than 64 at P = 80, N = 128.
    """
    least = max(_LEAST_CHUNK, (head_dim * state_dim) ** 0.5)
    while chunk_size % 2 == 0 and chunk_size // 2 >= least:
        chunk_size //= 2
    return chunk_size


def plan_chunks(length: int, chunk_size: int, most: int) -> Iterator[Chunks]:
    """Slabs of at most `most` whole chunks, then the shorter last chunk if there is one."""
    whole = length // chunk_size
    for index in range(0, whole, most):
        yield Chunks(index * chunk_size, min(most, whole - index), chunk_size, index)
    if length % chunk_size:
        yield Chunks(whole * chunk_size, 1, length % chunk_size, whole)


def plan_slabs(x_BLHP: Tensor, groups: int, chunk_size: int) -> tuple[int, int]:
    """Groups and chunks of one slab; the former divides the number of groups."""
    batch, length, heads, head_dim = x_BLHP.shape
    budget = _SLAB_ELEMENTS.get(x_BLHP.device.type, _SLAB_ELEMENTS_DEFAULT)
    width = min(chunk_size, length)
    per_group = batch * (heads // groups) * width * max(width, head_dim)
    fitting = [n for n in range(1, groups + 1) if groups % n == 0 and n * per_group <= budget]
    num_groups = max(fitting, default=1)
    return num_groups, max(1, budget // (num_groups * per_group))


@dataclass(frozen=True)
class Groups:
    """Some groups of heads, side by side in every tensor."""

    first: int
    count: int
    repeats: int

    def heads(self, tensor: Tensor, dim: int) -> Tensor:
        """View of these groups' heads with dimension `dim` (all heads) split into (G, R)."""
        heads = tensor.narrow(dim, self.first * self.repeats, self.count * self.repeats)
        return heads.unflatten(dim, (self.count, self.repeats))

    def state(self, state_BGNS: Tensor) -> Tensor:
        """View of a state as the scan stores it in the order callers use, (B, G, R, P, N)."""
        return state_BGNS.unflatten(-1, (self.repeats, -1)).permute(0, 1, 3, 4, 2)


@dataclass(frozen=True)
class Slab:
    """Some chunks of some groups: views of whole tensors, and copies in the layouts of products.

    A product of one head's own matrices takes (K*B*G*R, Q, P); a product with the group's B or C
    takes (K*B*G, Q, R*P). Both keep the innermost dimension of the source contiguous.
    """

    chunks: Chunks
    groups: Groups
    dtype: torch.dtype

    def view(self, tensor_BLHX: Tensor) -> Tensor:
        """View of (B, L, H, ...) as (K, B, Q, G, R, ...)."""
        return self.chunks.cut(self.groups.heads(tensor_BLHX, 2))

    def last(self, tensor_BLH: Tensor) -> Tensor:
        """View of (B, L, H) as (K, B, G, R, Q)."""
        return self.view(tensor_BLH).permute(0, 1, 3, 4, 2)

    def view_shared(self, tensor_BLGN: Tensor) -> Tensor:
        """View of (B, L, G, N) as (K, B, G, Q, N)."""
        part = tensor_BLGN.narrow(2, self.groups.first, self.groups.count)
        return self.chunks.cut(part).transpose(2, 3)

    def shared(self, tensor_BLGN: Tensor) -> Tensor:
        """Copy of (B, L, G, N) as (K*B*G, Q, N)."""
        return self.view_shared(tensor_BLGN).to(self.dtype).contiguous().flatten(0, 2)

    def by_head(self, view_KBQGRP: Tensor, weight_KBGRQ: Tensor | None) -> Tensor:
        """The view, times the weight if there is one, as (K*B*G*R, Q, P)."""
        source = view_KBQGRP.permute(0, 1, 3, 4, 2, 5)
        out = source.new_empty(source.shape, dtype=self.dtype)
        if weight_KBGRQ is None:
            out.copy_(source)
        else:
            torch.mul(source, weight_KBGRQ[..., None], out=out)
        return out.flatten(0, 3)

    def by_group(self, view_KBQGRP: Tensor, weight_KBGRQ: Tensor) -> Tensor:
        """The view times the weight as (K*B*G, Q, R*P)."""
        source = view_KBQGRP.transpose(2, 3)
        out = source.new_empty(source.shape, dtype=self.dtype)
        torch.mul(source, weight_KBGRQ.transpose(3, 4)[..., None], out=out)
        return out.flatten(4).flatten(0, 2)

    def from_heads(self, product_MQP: Tensor) -> Tensor:
        """View of a (K*B*G*R, Q, P) product as (K, B, Q, G, R, P)."""
        sizes = (self.chunks.count, -1, self.groups.count, self.groups.repeats)
        return product_MQP.unflatten(0, sizes).permute(0, 1, 4, 2, 3, 5)

    def from_groups(self, product_MQS: Tensor) -> Tensor:
        """View of a (K*B*G, Q, R*P) product as (K, B, Q, G, R, P)."""
        split = product_MQS.unflatten(2, (self.groups.repeats, -1))
        return split.unflatten(0, (self.chunks.count, -1, self.groups.count)).transpose(2, 3)

    def store_shared(self, product_MQN: Tensor, tensor_BLGN: Tensor) -> None:
        """Write a (K*B*G, Q, N) product into its place in a (B, L, G, N) tensor."""
        target = self.view_shared(tensor_BLGN)
        target.copy_(product_MQN.unflatten(0, target.shape[:3]))


def decays(slab: Slab, dt_BLH: Tensor, log_BLH: Tensor, ids: Ids | None) -> Decay:
    """Decays of one slab from dt and dt * A; `ids` are document numbers, None if there is one."""
    width = slab.chunks.width
    visible = torch.ones(width, width, dtype=torch.bool, device=dt_BLH.device).tril()[None, None]
    if ids is not None:
        here, came = slab.chunks.cut(ids.here_BL), slab.chunks.cut(ids.before_BL)[..., :1]
        visible = visible & (here[..., :, None] == here[..., None, :])
    # A product with zeros and ones restarts exactly: what it skips never enters. It runs in
    # float64 because these sums are subtracted from each other and TF32 would keep 10 bits.
    log = slab.last(log_BLH).double()
    sums = log.flatten(2, 3) @ visible.transpose(-1, -2).double()
    total = sums.unflatten(2, log.shape[2:4]).to(slab.dtype)
    enter = total.exp()
    leave = (total[..., -1:] - total).clamp_max_(0).exp_()  # the cap keeps what is masked finite
    if ids is not None:
        enter = enter * (here == came)[:, :, None, None]
        leave = leave * (here == here[..., -1:])[:, :, None, None]
    return Decay(visible, slab.last(dt_BLH), total, enter, leave, enter[..., -1])


def within(decay: Decay, B_MUN: Tensor, C_MTN: Tensor) -> tuple[Tensor, Tensor]:
    """C_t . B_u where t sees u, else 0: (K,B,G,T,U); exp(decay from u to t): (K,B,G,R,T,U).

    Where t does not see u the second is finite and meaningless: multiply it by the first.
    """
    total = decay.sum_KBGRQ
    score = torch.bmm(C_MTN, B_MUN.transpose(1, 2)).unflatten(0, total.shape[:3])
    score.mul_(decay.visible_KBTU[:, :, None])
    ratio = total[..., :, None] - total[..., None, :]
    return score, ratio.clamp_max_(0).exp_()
