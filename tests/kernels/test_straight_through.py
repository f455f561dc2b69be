"""Gradients through fake quantization."""

import pytest
import torch

from megatron_vl.kernels.nvfp4 import fake_nvfp4
from megatron_vl.kernels.static_fp8 import fake_fp8
from megatron_vl.kernels.straight_through import Fake, stand_in, straight_through


@pytest.mark.parametrize("fake", [fake_nvfp4, fake_fp8])
def test_the_gradient_goes_straight_through_unless_saturated(fake: Fake) -> None:
    generator = torch.Generator().manual_seed(4)
    values = torch.randn(8, 32, generator=generator).requires_grad_()
    largest = values.detach().abs().flatten().sort().values[-5]
    gradient = torch.randn(8, 32, generator=generator)
    shown = straight_through(values, largest, fake)
    assert torch.equal(shown, fake(values.detach(), largest))
    shown.backward(gradient)
    beyond = values.detach().abs() > largest
    assert int(beyond.sum()) == 4
    assert torch.equal(values.grad, gradient.masked_fill(beyond, 0))
    assert torch.allclose(shown[beyond].abs(), largest, rtol=1e-6)


def test_the_gradient_of_a_stand_in_is_the_weights() -> None:
    weight, values = torch.randn(4, 16).requires_grad_(), torch.randn(4, 16)
    gradient = torch.randn(4, 16)
    shown = stand_in(weight, values)
    assert torch.equal(shown, values)
    shown.backward(gradient)
    assert torch.equal(weight.grad, gradient)
