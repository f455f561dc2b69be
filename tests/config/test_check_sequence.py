"""Splits along the sequence: what breaks a rule, and the nearest value that keeps it."""

import pytest

from megatron_vl.config.check_sequence import fits_mamba
from tests.support.problems import problems

ALIGNED = ["data.document_alignment=16"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.context=2", "data.document_alignment=4"],
        ["parallel.context=4", *ALIGNED],
        ["parallel.context=8", *ALIGNED],
        ["parallel.context=4", "parallel.tensor=2", *ALIGNED],
        ["parallel.context=4", "parallel.tensor=2", "parallel.sequence=true", *ALIGNED],
    ],
    ids=" ".join,
)
def test_what_is_sound(overrides: list[str]) -> None:
    assert problems(*overrides) == []


@pytest.mark.parametrize(
    ("overrides", "said", "nearest"),
    [
        (["parallel.context=2"], "alignment is 1, must be a multiple of 4", "nearest valid: 4"),
        (
            ["parallel.context=4", "data.document_alignment=20", "data.sequence_length=480"],
            "alignment is 20, must be a multiple of 8 (2 * parallel.context 4)",
            "nearest valid: 16",
        ),
        (
            ["parallel.context=3", "data.document_alignment=6", "data.sequence_length=510"],
            "context is 3, must divide the 8 Mamba heads of a tensor rank",
            "nearest valid: 2",
        ),
        (
            ["parallel.context=8", "parallel.tensor=2", *ALIGNED],
            "context is 8, must divide the 4 Mamba heads of a tensor rank",
            "nearest valid: 4",
        ),
        (
            [
                "model.decoder.mamba_num_groups=4",
                "model.decoder.mamba_num_heads=12",
                "parallel.context=3",
                "data.document_alignment=6",
                "data.sequence_length=510",
            ],
            "divide or be a multiple of its 4 groups",
            "nearest valid: 2",
        ),
        (
            ["parallel.context=4", "data.document_alignment=8", "data.sequence_length=508"],
            "length is 508, must be a multiple of 8, that is 2 * parallel.context 4",
            "nearest valid: 512",
        ),
        (
            [
                "parallel.context=4",
                "parallel.tensor=2",
                "parallel.sequence=true",
                "data.document_alignment=8",
                "data.sequence_length=520",
            ],
            "multiple of 16, that is parallel.tensor 2 (parallel.sequence is true) times "
            "2 * parallel.context 4",
            "nearest valid: 512",
        ),
        (["parallel.sequence=true"], "parallel.tensor is 1", "parallel.tensor 2"),
    ],
)
def test_what_is_refused(overrides: list[str], said: str, nearest: str) -> None:
    found = problems(*overrides)
    assert any(said in line and nearest in line for line in found), found


def test_published_layouts_fit() -> None:
    """128 heads in 8 groups: TP8 leaves 16 heads and one group, which 8 context ranks copy."""
    assert fits_mamba(16, 1, 8)
    assert fits_mamba(16, 1, 2)
    assert fits_mamba(128, 8, 4)
    assert fits_mamba(128, 8, 16)
    assert not fits_mamba(16, 1, 32)
    assert not fits_mamba(12, 4, 6)
