"""NVFP4 fake quantization against the exporter's bytes."""

import pytest
import torch
from torch import Tensor

from checkpoint_tools import quantize
from megatron_vl.kernels.nvfp4 import fake_nvfp4

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


def decoded(packed: quantize.Fp4, scale: Tensor) -> Tensor:
    """The values of NVFP4 bytes, by the format's definition."""
    codes = torch.stack([packed.codes & 15, packed.codes >> 4], dim=-1).flatten(1).long()
    steps = packed.block_scales.float() * scale
    return (E2M1[codes].unflatten(1, (-1, 16)) * steps.unsqueeze(-1)).flatten(1)


def matrix(seed: int, spread: float) -> Tensor:
    """Magnitudes over many powers of e; a row and a block of zeros, and one huge or tiny number."""
    generator = torch.Generator().manual_seed(seed)
    spreads = (spread * torch.randn(48, 64, generator=generator)).exp()
    values = torch.randn(48, 64, generator=generator) * spreads
    values[3], values[5, 16:32] = 0, 0
    values[7, 3] = 3e3 if seed % 2 else 1e-30
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spread", "factor"), [(0, 1), (1, 1), (6, 1), (1, 1e-38), (1, 1e7)])
def test_equals_what_an_export_decodes_to(dtype: torch.dtype, spread: float, factor: float) -> None:
    for seed in range(8):
        values = (matrix(seed, spread) * factor).to(dtype)
        largest = quantize.amax(values)
        scale = quantize.fp4_scale(largest)
        expected = decoded(quantize.to_fp4(values, scale), scale)
        assert len(expected.unique()) > 8
        assert torch.equal(fake_nvfp4(values, largest, torch.float32), expected)
        assert torch.equal(fake_nvfp4(values, largest), expected.to(dtype))


def test_rounds_every_border_to_the_even_code() -> None:
    """A block of 6 and the borders between codes: its scale is 1."""
    borders = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    block = torch.cat([torch.tensor([6.0]), borders, -borders, torch.zeros(1)])
    found = fake_nvfp4(block, torch.tensor(6.0 * 448))
    even = torch.tensor([0, 1, 1, 2, 2, 4, 4.0])
    assert torch.equal(found, torch.cat([torch.tensor([6.0]), even, -even, torch.zeros(1)]))


def test_a_large_matrix_is_quantized_as_its_rows_are() -> None:
    """In groups of rows, on any leading axes, and nothing but the tensor's scale is shared."""
    values = torch.randn(5, 1000, 128, generator=torch.Generator().manual_seed(2))
    largest = values.abs().max()
    found = fake_nvfp4(values, largest)
    rows = torch.stack([fake_nvfp4(row, largest) for row in values[3]])
    assert torch.equal(found[3], rows)


def test_zeros_stay_and_what_is_broken_shows() -> None:
    assert torch.equal(fake_nvfp4(torch.zeros(2, 32), torch.tensor(0.0)), torch.zeros(2, 32))
    for broken in (torch.inf, torch.nan):
        values = torch.ones(1, 32)
        values[0, 3] = broken
        found = fake_nvfp4(values, torch.tensor(1.0))
        assert found[0, :16].isnan().all()
        assert torch.equal(found[0, 16:], torch.ones(16))
