"""Counts at the published sizes, and at sizes small enough to count by hand."""

import subprocess
import sys

import pytest

from megatron_vl.cost.parameters import model_parameters
from tests.support.sizes import PATTERN_12B, full_size, small


def test_counts_at_the_published_sizes_are_exact() -> None:
    counts = model_parameters(full_size())
    assert len(PATTERN_12B) == 62
    assert [PATTERN_12B.count(sign) for sign in "M-*"] == [28, 28, 6]
    assert counts.decoder.total == 12_310_001_152
    assert counts.projector == 209_720_320
    # 32 layers of 19.68 M, a table of 128^2 x 1280, 16 prefix tokens, a patch embedding of 768.
    assert counts.encoder.total == 32 * 19_677_440 + 16384 * 1280 + 16 * 1280 + 768 * 1280
    assert round(counts.encoder.total / 1e9, 3) == 0.652
    assert counts.total == counts.decoder.total + counts.projector + counts.encoder.total


def test_counts_by_hand() -> None:
    counts = model_parameters(small())
    # Mamba: inner 8, convolved 8 + 2*2*3 = 20, projected 8 + 20 + 4 = 32.
    assert counts.decoder.mamba_layer == 32 * 4 + 8 * 4 + 20 * 5 + 3 * 4 + 8 + 4
    assert counts.decoder.mlp_layer == 2 * 4 * 6 + 4
    assert counts.decoder.attention_layer == (6 + 3 + 3) * 4 + 6 * 4 + 4
    assert counts.decoder.embedding == counts.decoder.output == 48
    assert counts.decoder.total == 284 + 52 + 76 + 48 + 48 + 4
    assert counts.encoder.patch_embedding == 3 * 4 * 4
    assert counts.encoder.layer == (4 * 12 + 12) + (4 * 4 + 4) + (4 * 8 + 8) + (8 * 4 + 4) + 16
    assert counts.projector == 16 + 16 * 5 + 5 * 4


def test_parts_add_up() -> None:
    counts = model_parameters(small("MM--**"))
    assert counts.of_parts({"encoder", "projector", "decoder"}) == counts.total
    assert counts.of_parts({"projector"}) == counts.projector
    assert counts.of_parts(set()) == 0


def test_an_unknown_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="'E'"):
        model_parameters(small("ME"))


def test_no_torch_is_imported() -> None:
    code = (
        "import sys, megatron_vl.cost.flops, megatron_vl.cost.bytes, megatron_vl.run.goodput; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
