"""The definition the kernels are compared with: one token at a time, in float64."""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Case:
    """Inputs of one scan; every floating tensor may require a gradient."""

    x: Tensor
    dt: Tensor
    A_log: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    z: Tensor
    dt_bias: Tensor
    start: Tensor
    seq_idx: Tensor

    NAMES = ("x", "dt", "A_log", "B", "C", "D", "z", "dt_bias", "start")

    def leaves(self) -> list[Tensor]:
        """The tensors with gradients, in the order of NAMES."""
        return [getattr(self, name) for name in self.NAMES]

    def to(self, dtype: torch.dtype) -> "Case":
        """A copy in another dtype whose tensors are leaves."""
        copies = {n: getattr(self, n).detach().to(dtype).requires_grad_() for n in self.NAMES}
        return replace(self, **copies)

    def cut(self, row: int, start: int, stop: int) -> "Case":
        """One stretch of one row, as a batch of its own, sharing gradients with this case."""
        over_time = {
            n: getattr(self, n)[row : row + 1, start:stop]
            for n in ("x", "dt", "B", "C", "z", "seq_idx")
        }
        return replace(self, **over_time, start=torch.zeros_like(self.start[row : row + 1]))


def draw(
    batch: int,
    length: int,
    heads: int,
    head_dim: int,
    groups: int,
    state_dim: int,
    documents: int = 1,
    seed: int = 0,
    per_channel_skip: bool = False,
) -> Case:
    """Random inputs with decays from slow to fast and documents of random lengths."""
    torch.manual_seed(seed)
    seq_idx = torch.zeros(batch, length, dtype=torch.int32)
    for row in range(batch):
        for start in torch.randperm(length - 1)[: documents - 1] + 1:
            seq_idx[row, start:] += 1
    return Case(
        x=torch.randn(batch, length, heads, head_dim),
        dt=torch.randn(batch, length, heads),
        A_log=torch.rand(heads) * 2.7,
        B=torch.randn(batch, length, groups, state_dim),
        C=torch.randn(batch, length, groups, state_dim),
        D=torch.randn(heads, head_dim) if per_channel_skip else torch.randn(heads),
        z=torch.randn(batch, length, heads, head_dim),
        dt_bias=torch.randn(heads) - 2,
        start=torch.randn(batch, heads, head_dim, state_dim),
        seq_idx=seq_idx,
    )


def scan(case: Case, low: float = 0.0, high: float = float("inf")) -> tuple[Tensor, Tensor]:
    """Output and final state of the recurrence, gated by silu(z)."""
    repeats = case.x.shape[2] // case.B.shape[2]
    step = F.softplus(case.dt + case.dt_bias).clamp(low, high)
    decay = torch.exp(-torch.exp(case.A_log) * step)
    skip = case.D[:, None] if case.D.dim() == 1 else case.D
    state, outputs = case.start, []
    for t in range(case.x.shape[1]):
        if t:
            same = case.seq_idx[:, t] == case.seq_idx[:, t - 1]
            state = state * same[:, None, None, None]
        B = case.B[:, t].repeat_interleave(repeats, 1)
        C = case.C[:, t].repeat_interleave(repeats, 1)
        moved = (step[:, t, :, None] * case.x[:, t])[..., None] * B[:, :, None]
        state = state * decay[:, t, :, None, None] + moved
        outputs.append((state * C[:, :, None]).sum(-1) + skip * case.x[:, t])
    return torch.stack(outputs, 1) * F.silu(case.z), state


def relative(value: Tensor, reference: Tensor) -> float:
    """Relative L2 distance."""
    return ((value.double() - reference.double()).norm() / reference.double().norm()).item()
