"""Which grid of square tiles an image is cut into, and how grids shrink when a sample is too long.

The rule is the published one of the dynamic tiling used by the Nano V2 VL family, generalised from
512-pixel tiles to any tile size. It is pure arithmetic on the image's width and height, so lengths
are known from an image header, before any pixel is decoded.

Costs at most 35 comparisons an image (for 12 tiles). Refuses sizes below one pixel.
"""

from functools import lru_cache
from typing import NamedTuple

STEP_DOWN = (12, 8, 6, 4, 2, 1)
"""Tile limits tried one after the other for a sample that does not fit its sequence."""


class Grid(NamedTuple):
    """Columns and rows of tiles."""

    cols: int
    rows: int

    @property
    def cells(self) -> int:
        """Tiles of the grid, the thumbnail not counted."""
        return self.cols * self.rows

    @property
    def num_tiles(self) -> int:
        """Tiles that reach the encoder: the cells, and a thumbnail iff there is more than one."""
        return self.cells + (1 if self.cells > 1 else 0)


@lru_cache(maxsize=64)
def candidate_grids(max_tiles: int) -> tuple[Grid, ...]:
    """Every grid of at most max_tiles cells: fewest cells first, then fewest columns.

    The order inside one number of cells is explicit because a tie would depend on it; with the
    published limit of 12 cells it changes no result (two ratios of equal area never tie).
    """
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; an image needs at least 1 tile")
    grids = [
        Grid(cols, rows)
        for cols in range(1, max_tiles + 1)
        for rows in range(1, max_tiles // cols + 1)
    ]
    return tuple(sorted(grids, key=lambda grid: (grid.cells, grid.cols)))


AREA_WEIGHT_CAP = 0.6
"""A grid's area counts for no more than this part of the image's in the area-weighted choice."""


def tile_grid(
    width: int, height: int, *, tile_size: int, max_tiles: int, area_weighted: bool = False
) -> Grid:
    """The grid whose aspect ratio is nearest to the image's.

    Among grids of exactly equal distance the larger one wins only if the image has more than half
    the larger grid's pixels, so that small images are not blown up. The area-weighted choice, an
    option of the paper's ablation, also prefers grids that come near the image's area.

    Args:
        width, height: size of the upright image. [pixels]
        tile_size: edge of a square tile. [pixels]
        max_tiles: most cells of the grid, the thumbnail not counted. [tiles]
        area_weighted: weigh area and ratio instead of taking the nearest ratio.

    Raises:
        ValueError: a size below 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"image size is {width} x {height}; both must be at least 1 pixel")
    if tile_size < 1:
        raise ValueError(f"tile_size is {tile_size}; it must be at least 1 pixel")
    choose = _area_weighted if area_weighted else _nearest_ratio
    return choose(width, height, tile_size, candidate_grids(max_tiles))


def _nearest_ratio(width: int, height: int, tile_size: int, grids: tuple[Grid, ...]) -> Grid:
    ratio = width / height
    best, best_distance = Grid(1, 1), float("inf")
    for grid in grids:
        distance = abs(ratio - grid.cols / grid.rows)
        if distance < best_distance:
            best, best_distance = grid, distance
        elif distance == best_distance and 2 * width * height > tile_size**2 * grid.cells:
            best = grid
    return best


def _area_weighted(width: int, height: int, tile_size: int, grids: tuple[Grid, ...]) -> Grid:
    """Largest min(area ratio, 0.6) * min(ratio match); the first of equals, as published."""
    ratio, area = width / height, width * height
    best, best_score = Grid(1, 1), 0.0
    for grid in grids:
        shape = grid.cols / grid.rows
        covered = min(grid.cells * tile_size**2 / area, AREA_WEIGHT_CAP)
        score = covered * min(shape / ratio, ratio / shape)
        if score > best_score:
            best, best_score = grid, score
    return best


def num_tiles(
    width: int, height: int, *, tile_size: int, max_tiles: int, area_weighted: bool = False
) -> int:
    """Tiles of an image, its thumbnail included. See `tile_grid`."""
    return tile_grid(
        width, height, tile_size=tile_size, max_tiles=max_tiles, area_weighted=area_weighted
    ).num_tiles


def tile_limits(max_tiles: int) -> tuple[int, ...]:
    """The limits a sample may fall back to, largest first, starting with max_tiles itself."""
    if max_tiles < 1:
        raise ValueError(f"max_tiles is {max_tiles}; an image needs at least 1 tile")
    return (max_tiles, *(limit for limit in STEP_DOWN if limit < max_tiles))
