"""FP8 fake quantization against the exporter's bytes."""

import pytest
import torch

from checkpoint_tools import quantize
from megatron_vl.kernels.static_fp8 import fake_fp8
from tests.kernels.test_nvfp4 import matrix


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spread", "factor"), [(0, 1), (1, 1), (6, 1), (1, 1e-30), (1, 1e7)])
def test_equals_what_an_export_decodes_to(dtype: torch.dtype, spread: float, factor: float) -> None:
    """Subnormal bytes and numbers beyond the amax among them."""
    for seed in range(8):
        values = (matrix(seed, spread) * factor).to(dtype)
        for largest in (quantize.amax(values), quantize.amax(values) / 3):
            scale = quantize.fp8_scale(largest)
            expected = quantize.to_fp8(values, scale).float() * scale
            assert len(expected.unique()) > 20
            assert torch.equal(fake_fp8(values, largest, torch.float32), expected)
            assert torch.equal(fake_fp8(values, largest), expected.to(dtype))


def test_zeros_stay_and_what_is_broken_shows() -> None:
    assert torch.equal(fake_fp8(torch.zeros(2, 3), torch.tensor(0.0)), torch.zeros(2, 3))
    for broken in (torch.inf, -torch.inf, torch.nan):
        found = fake_fp8(torch.tensor([1.0, broken, -2.0]), torch.tensor(2.0))
        assert torch.equal(found.isnan(), torch.tensor([False, True, False]))
