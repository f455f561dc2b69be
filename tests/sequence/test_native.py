"""Whole images: their own ratio within a budget, or the tokens of tiling."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.grids import num_tiles
from megatron_vl.sequence.native import matched_grid, native_grid

EDGE = st.integers(1, 6000)
BUDGET = {"patch_size": 16, "min_patches": 256, "max_patches": 12288, "max_edge": 128}


@given(EDGE, EDGE, st.sampled_from([4, 64, 1024, 12288]), st.sampled_from([2, 32, 128]))
def test_the_budget_holds(width: int, height: int, most: int, edge: int) -> None:
    grid = native_grid(width, height, patch_size=16, min_patches=4, max_patches=most, max_edge=edge)
    assert grid.rows % 2 == grid.columns % 2 == 0
    assert 2 <= grid.rows <= edge
    assert 2 <= grid.columns <= edge
    assert grid.patches <= most
    assert grid.tokens * 4 == grid.patches


@given(st.integers(300, 2000), st.integers(300, 2000))
def test_the_ratio_is_the_images_own(width: int, height: int) -> None:
    grid = native_grid(width, height, **BUDGET)
    ratio = grid.columns / grid.rows / (width / height)
    assert abs(math.log(ratio)) < 1.5 / min(grid.rows, grid.columns) * 2


@pytest.mark.parametrize(
    ("size", "rows", "columns"),
    [
        ((640, 480), 30, 40),
        ((512, 512), 32, 32),
        ((1600, 1200), 76, 100),
        ((3000, 2000), 86, 128),
        ((100, 100), 16, 16),
        ((1, 1), 16, 16),
        ((6144, 512), 10, 128),
        ((1, 10000), 128, 2),
    ],
)
def test_sizes(size: tuple[int, int], rows: int, columns: int) -> None:
    """Kept as it is, shrunk to the edge, blown up to the fewest patches, or both."""
    assert native_grid(*size, **BUDGET) == (rows, columns)


@given(EDGE, EDGE)
def test_a_matched_image_costs_what_its_tiles_cost(width: int, height: int) -> None:
    tokens = 256 * num_tiles(width, height, tile_size=512, max_tiles=12)
    grid = matched_grid(width, height, tokens=tokens, max_edge=128)
    assert 0.95 * tokens <= grid.tokens <= tokens
    assert max(grid) <= 128
    assert grid.rows % 2 == grid.columns % 2 == 0
    turned = matched_grid(height, width, tokens=tokens, max_edge=128)
    assert turned.tokens == grid.tokens
    assert sorted(turned) == sorted(grid)


@given(st.floats(0.4, 2.5))
def test_a_matched_image_keeps_its_ratio_where_there_is_room(ratio: float) -> None:
    width, height = round(1000 * ratio), 1000
    tokens = 256 * num_tiles(width, height, tile_size=512, max_tiles=8)
    grid = matched_grid(width, height, tokens=tokens, max_edge=10**4)
    assert abs(math.log(grid.columns / grid.rows / ratio)) < 0.12


def test_a_small_position_table_limits_the_tokens() -> None:
    assert matched_grid(64, 64, tokens=3328, max_edge=32).tokens == 256


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        native_grid(0, 5, **BUDGET)
    with pytest.raises(ValueError, match="5 x 0"):
        matched_grid(5, 0, tokens=256, max_edge=128)
