"""The gated norm against transformers' and against autograd through its definition."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.kernels.gated_norm import RMSNorm, gated_rms_norm


def definition(x: Tensor, weight: Tensor, z: Tensor | None, size: int, before: bool) -> Tensor:
    if z is not None and not before:
        x = x * F.silu(z)
    groups = x.unflatten(-1, (-1, size))
    normed = groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    out = normed.flatten(-2) * weight
    return out * F.silu(z) if z is not None and before else out


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("size", [8, 24])
def test_values_and_gradients_follow_the_definition(before: bool, gated: bool, size: int) -> None:
    torch.manual_seed(0)
    x, z = (torch.randn(3, 5, 24, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weight = torch.randn(24, dtype=torch.float64, requires_grad=True)
    gate = z if gated else None
    y, reference = (
        gated_rms_norm(x, weight, gate, 1e-5, size, before),
        definition(x, weight, gate, size, before),
    )
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    leaves, cotangent = [x, weight] + [z] * gated, torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, cotangent)
    exact = torch.autograd.grad(reference, leaves, cotangent)
    for one, other in zip(grads, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_equals_the_norm_of_transformers(dtype: torch.dtype) -> None:
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    torch.manual_seed(0)
    theirs = modeling.NemotronHRMSNormGated(32, group_size=8, eps=1e-5).to(dtype)
    ours = RMSNorm(32, eps=1e-5, group_size=8, norm_before_gate=False, dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(32))
    ours.load_state_dict(theirs.state_dict())
    x, z = torch.randn(4, 32, dtype=dtype), torch.randn(4, 32, dtype=dtype)
    bound = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(ours(x, z), theirs(x, z), rtol=bound, atol=bound)
    torch.testing.assert_close(ours(x), theirs(x), rtol=bound, atol=bound)
    assert ours(x).dtype == dtype


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm = RMSNorm(16, group_size=8)
    norm.weight.requires_grad_(False)
    x, z = torch.randn(2, 16, requires_grad=True), torch.randn(2, 16)
    norm(x, z).sum().backward()
    assert norm.weight.grad is None
    assert z.grad is None
    assert x.grad is not None


def test_groups_must_divide_and_the_gate_must_fit() -> None:
    with pytest.raises(ValueError, match="divide"):
        RMSNorm(10, group_size=4)(torch.ones(1, 10))
    with pytest.raises(ValueError, match="gate"):
        RMSNorm(8)(torch.ones(2, 8), torch.ones(1, 8))
