"""Compares the published Triton kernels with the project's: `python -m tests.kernels.published`.

Stand-ins let them run without CUDA: an empty module for the extension mamba_ssm imports, one
configuration for each tuned kernel, no device to switch to, and, in the fused case, the project's
convolution in place of causal_conv1d's two functions. float32 alone: the interpreter multiplies
bfloat16 matrices by their bits.

Shapes: L tokens, H heads, P head width, G groups, N state width, W taps, as in `kernels.ssd`.
"""

import contextlib
import os
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import torch
from torch import Tensor

from megatron_vl.engine import platform
from megatron_vl.engine.hybrid_stack import scan_kernel
from megatron_vl.kernels import conv1d, decode, gated_norm, ssd

HEADS, HEAD_DIM, GROUPS, STATE, CHUNK, TAPS = 4, 16, 2, 16, 32, 4
INNER, CHANNELS = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE
DOCUMENTS = (7, 25, 1, 31, 19)
"""Documents that end inside a chunk, at its end, and after one token."""


def prepare() -> None:
    """Make mamba_ssm importable, and its kernels callable."""
    sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")
    from triton.runtime.autotuner import Autotuner

    tuned = Autotuner.__init__

    def with_one_configuration(self: Any, *args: Any, **kwargs: Any) -> None:
        tuned(self, *args, **kwargs)
        self.configs = self.configs[:1]

    Autotuner.__init__ = with_one_configuration
    cuda: Any = torch.cuda
    cuda.device = lambda index: contextlib.nullcontext()
    properties = types.SimpleNamespace(multi_processor_count=8, major=9, minor=0)
    cuda.get_device_properties = lambda device=None: properties


def assert_near(name: str, found: Tensor, expected: Tensor) -> None:
    """Relative L2 distance of float32 rounding, and the same dtype."""
    assert found.dtype is expected.dtype, name
    distance = float((found - expected).double().norm() / expected.double().norm())
    assert distance < 5e-6, (name, distance)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, requires_grad=True)


def split_scan(case: str) -> None:
    """The scan of a packed row, between the projections; forward and every gradient."""
    if case == "fused":
        give_a_convolution()
    kernel = scan_kernel(
        replace(platform.PLATFORM, has_mamba_ssm=True, has_causal_conv1d=case == "fused")
    )
    length = sum(DOCUMENTS)
    inputs = {
        "zxBCdt": normal(1, length, INNER + CHANNELS + HEADS),
        "weight": normal(CHANNELS, TAPS),
        "bias": normal(CHANNELS),
        "dt_bias": normal(HEADS),
        "A": (-torch.rand(HEADS) - 0.5).requires_grad_(),
    }
    skip = normal(HEADS)
    ids_L = torch.repeat_interleave(
        torch.arange(len(DOCUMENTS), dtype=torch.int32), torch.tensor(DOCUMENTS)
    )
    gradient = torch.randn(1, length, INNER)

    def outcome(function: Callable[..., Any]) -> list[Tensor]:
        y = function(
            *inputs.values(), D=skip, chunk_size=CHUNK, seq_idx=ids_L.unsqueeze(0),
            activation="silu", headdim=HEAD_DIM, ngroups=GROUPS, norm_before_gate=False,
        )  # fmt: skip
        return [y.detach(), *torch.autograd.grad(y, [*inputs.values(), skip], gradient)]

    both = zip(outcome(kernel), outcome(ssd.mamba_split_conv1d_scan_combined), strict=True)
    for name, (found, expected) in zip(["y", *inputs, "D"], both, strict=True):
        assert_near(name, found, expected)


def give_a_convolution() -> None:
    """Put the project's convolution where the fused kernel calls causal_conv1d's."""
    from mamba_ssm.ops.triton import ssd_combined

    def forward(
        x: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, start: None, end: None, silu: bool
    ) -> Tensor:
        assert ids.dtype is torch.int32
        assert ids.is_contiguous()
        assert x.stride(1) == 1, "channels are contiguous, as seq_idx asks"
        out = conv1d.causal_conv1d_fn(x, weight, bias, ids, activation="silu" if silu else None)
        assert isinstance(out, Tensor)
        return out

    def backward(
        x: Tensor, weight: Tensor, bias: Tensor, dout: Tensor, ids: Tensor,
        start: None, dend: None, dx: Tensor, want_dstart: bool, silu: bool,
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        with torch.enable_grad():
            leaves = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
            out = forward(leaves[0], leaves[1], leaves[2], ids, start, None, silu)
            grads = torch.autograd.grad(out, leaves, dout)
        dx.copy_(grads[0])
        return dx, *grads[1:], None

    ssd_combined.causal_conv1d_fwd_function = forward
    ssd_combined.causal_conv1d_bwd_function = backward


def update() -> None:
    """One token of decoding; the state moves on in place."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    with torch.no_grad():
        batch = 2
        x, z = normal(batch, HEADS, HEAD_DIM), normal(batch, HEADS, HEAD_DIM)
        dt = normal(batch, HEADS)[..., None].expand(-1, -1, HEAD_DIM)
        dt_bias = normal(HEADS)[:, None].expand(-1, HEAD_DIM)
        A = -torch.rand(HEADS)[:, None, None].expand(-1, HEAD_DIM, STATE) - 0.5
        B, C = normal(batch, GROUPS, STATE), normal(batch, GROUPS, STATE)
        D = normal(HEADS)[:, None].expand(-1, HEAD_DIM)
        state = torch.randn(batch, HEADS, HEAD_DIM, STATE)
        states = state.clone(), state.clone()
        found, expected = (
            function(mine, x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)
            for function, mine in zip(
                (selective_state_update, decode.selective_state_update), states, strict=True
            )
        )
        assert_near("output", found, expected)
        assert_near("state", *states)


def norm() -> None:
    """The grouped norm behind the scan, with a gate before it and without one."""
    from mamba_ssm.ops.triton.layernorm_gated import RMSNorm

    options: dict[str, Any] = {"group_size": INNER // GROUPS, "norm_before_gate": False}
    theirs, ours = RMSNorm(INNER, **options), gated_norm.RMSNorm(INNER, **options)
    weight = torch.randn(INNER)
    x, gradient = normal(5, 1, INNER), torch.randn(5, 1, INNER)
    for gate in (None, normal(5, 1, INNER)):
        outcomes = []
        for module in (theirs, ours):
            module.weight.data.copy_(weight)
            y = module(x) if gate is None else module(x, gate)
            leaves = [x, module.weight] + ([] if gate is None else [gate])
            outcomes.append([y.detach(), *torch.autograd.grad(y, leaves, gradient)])
        for number, (found, expected) in enumerate(zip(*outcomes, strict=True)):
            assert_near(f"norm {number}", found, expected)


def main(case: str) -> None:
    """Compare one kernel."""
    prepare()
    torch.manual_seed(4)
    if case in ("scan", "fused"):
        split_scan(case)
    elif case == "update":
        update()
    else:
        assert case == "norm", case
        norm()
    print(f"{case}: the same")


if __name__ == "__main__":
    main(sys.argv[1])
