"""Tile grids against the published vectors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.grids import Grid, candidate_grids, num_tiles, tile_grid, tile_limits
from megatron_vl.sequence.visual import PatchGrid

VECTORS = """
512x512:1x1/1/256/1x1 724x724:1x1/1/256/2x2 725x725:2x2/5/1280/2x2
1024x1024:2x2/5/1280/2x2 1536x1536:3x3/10/2560/3x3 336x336:1x1/1/256/1x1
640x480:4x3/13/3328/4x3 480x640:3x4/13/3328/3x4 640x427:3x2/7/1792/3x2
800x600:4x3/13/3328/4x3 1024x768:4x3/13/3328/4x3 1600x1200:4x3/13/3328/4x3
2048x1536:4x3/13/3328/4x3 1280x720:2x1/3/768/4x2 1366x768:4x2/9/2304/4x2
1920x1080:4x2/9/2304/4x2 3840x2160:4x2/9/2304/4x3 1080x1920:2x4/9/2304/2x4
1536x1024:3x2/7/1792/3x2 1024x1536:2x3/7/1792/2x3 3000x2000:3x2/7/1792/4x3
1240x1754:2x3/7/1792/2x3 2480x3508:2x3/7/1792/3x4 1754x1240:4x3/13/3328/3x2
1700x2200:3x4/13/3328/3x4 595x842:2x3/7/1792/2x3 850x600:3x2/7/1792/3x2
481x202:5x2/11/2816/5x2 1178x1779:2x3/7/1792/2x3 2048x512:4x1/5/1280/4x1
512x2048:1x4/5/1280/1x4 3000x1000:6x2/13/3328/6x2 1000x3000:2x6/13/3328/2x6
6144x512:12x1/13/3328/12x1 10000x500:12x1/13/3328/12x1 1x10000:1x12/13/3328/1x12
1x1:1x1/1/256/1x1
"""
"""Width x height: grid / tiles with thumbnail / tokens / area-weighted grid."""

LOWERED = {
    (640, 480): {12: (4, 3), 8: (3, 2), 6: (3, 2), 4: (1, 1), 2: (1, 1), 1: (1, 1)},
    (1240, 1754): {12: (2, 3), 8: (2, 3), 6: (2, 3), 4: (1, 2), 2: (1, 2), 1: (1, 1)},
    (1920, 1080): {12: (4, 2), 8: (4, 2), 6: (2, 1), 4: (2, 1), 2: (2, 1), 1: (1, 1)},
}


@pytest.mark.parametrize("vector", VECTORS.split())
def test_published_vectors(vector: str) -> None:
    size, _, rest = vector.partition(":")
    width, height = map(int, size.split("x"))
    grid, tiles, tokens, area_weighted = rest.split("/")
    assert tile_grid(width, height, tile_size=512, max_tiles=12) == tuple(map(int, grid.split("x")))
    assert num_tiles(width, height, tile_size=512, max_tiles=12) == int(tiles)
    assert PatchGrid(32, 32).tokens * int(tiles) == int(tokens)
    weighted = tile_grid(width, height, tile_size=512, max_tiles=12, area_weighted=True)
    assert weighted == tuple(map(int, area_weighted.split("x")))


@pytest.mark.parametrize("size", LOWERED)
def test_lowered_limits(size: tuple[int, int]) -> None:
    for limit, grid in LOWERED[size].items():
        assert tile_grid(*size, tile_size=512, max_tiles=limit) == grid


def test_there_are_35_candidates_in_a_fixed_order() -> None:
    grids = candidate_grids(12)
    assert len(grids) == len(set(grids)) == 35
    assert grids[:6] == ((1, 1), (1, 2), (2, 1), (1, 3), (3, 1), (1, 4))
    assert [grid.cells for grid in grids] == sorted(grid.cells for grid in grids)


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([32, 64, 512]))
def test_the_rule_scales_with_the_tile(width: int, height: int, tile: int) -> None:
    grid = tile_grid(width, height, tile_size=tile, max_tiles=12)
    assert 1 <= grid.cells <= 12
    assert tile_grid(3 * width, 3 * height, tile_size=3 * tile, max_tiles=12) == grid
    assert grid.num_tiles == grid.cells + (grid.cells > 1)


def test_limits_step_down() -> None:
    assert tile_limits(12) == (12, 8, 6, 4, 2, 1)
    assert tile_limits(9) == (9, 8, 6, 4, 2, 1)
    assert tile_limits(1) == (1,)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="0 x 5"):
        tile_grid(0, 5, tile_size=64, max_tiles=12)
    with pytest.raises(ValueError, match="max_tiles is 0"):
        tile_grid(5, 5, tile_size=64, max_tiles=0)


def test_tokens_of_a_tile() -> None:
    assert PatchGrid(512 // 16, 512 // 16).tokens == 256
    assert PatchGrid(64 // 8, 64 // 8).tokens == 16
    assert Grid(4, 3).num_tiles == 13
