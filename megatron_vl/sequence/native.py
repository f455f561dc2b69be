"""The size of an image that is encoded whole, at its own aspect ratio, instead of in tiles.

Two rules of the paper's ablation (arXiv 2511.03929, table 7; it does not give them in detail, so
these are this project's). `native_grid` keeps an image's own resolution within a patch budget.
`matched_grid` spends the tokens that tiling would have spent on the same image. Edges are whole
numbers of 2 x 2 patch squares, so that pixel shuffle pads nothing, and no longer than the encoder's
position table.

Arithmetic on width and height alone: no pixel is read. Refuses sizes below one pixel.
"""

import math

from megatron_vl.sequence.counts import PIXEL_SHUFFLE
from megatron_vl.sequence.visual import PatchGrid

MATCHED = 0.95
"""Part of the tiling's tokens that a matched image has at least, if the position table allows."""

_SQUARE = PIXEL_SHUFFLE**2


def native_grid(
    width: int, height: int, *, patch_size: int, min_patches: int, max_patches: int, max_edge: int
) -> PatchGrid:
    """Patches of an image at its own resolution, scaled where that leaves the budget.

    The ratio is kept but for rounding to whole patch squares. The budget's upper end and max_edge
    always hold; the lower end gives way to max_edge for very long images.

    Args:
        width, height: size of the upright image. [pixels]
        patch_size: edge of a patch. [pixels]
        min_patches, max_patches: the budget; at least one patch square. [patches]
        max_edge: longest edge. [patches]

    Raises:
        ValueError: a size below 1.
    """
    _check(width, height)
    assert max_patches >= _SQUARE
    assert min_patches <= max_patches
    step = patch_size * PIXEL_SHUFFLE
    columns, rows = width / step, height / step
    longest = max_edge // PIXEL_SHUFFLE
    most, least = max_patches // _SQUARE, min_patches / _SQUARE
    scale = min(1.0, math.sqrt(most / (rows * columns)))
    scale = max(scale, math.sqrt(least / (rows * columns)))
    scale = min(scale, longest / max(rows, columns))
    across, down = max(1, round(columns * scale)), max(1, round(rows * scale))
    if across * down > most:  # the edge that rounding lengthened more gives way
        if across - columns * scale > down - rows * scale:
            across = max(1, most // down)
        else:
            down = max(1, most // across)
    return _patches(min(down, most), min(across, most))


def matched_grid(width: int, height: int, *, tokens: int, max_edge: int) -> PatchGrid:
    """Patches of an image that spends at most, and nearly, a number of tokens.

    Of all grids with at least 95 % of the tokens, the one whose ratio is nearest to the image's;
    where the position table is too small for that many, the ratio gives way.

    Args:
        width, height: size of the upright image. [pixels]
        tokens: what tiling would spend. [visual embeddings]
        max_edge: longest edge. [patches]

    Raises:
        ValueError: a size below 1.
    """
    _check(width, height)
    longest = max_edge // PIXEL_SHUFFLE
    pairs = [(edge, min(tokens // edge, longest)) for edge in range(1, min(tokens, longest) + 1)]
    grids = [*pairs, *((columns, rows) for rows, columns in pairs)]
    enough = min(MATCHED * tokens, max(rows * columns for rows, columns in grids))
    fitting = [(rows, columns) for rows, columns in grids if rows * columns >= enough]
    ratio = math.log(width / height)
    rows, columns = min(fitting, key=lambda grid: abs(math.log(grid[1] / grid[0]) - ratio))
    return _patches(rows, columns)


def _check(width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise ValueError(f"image size is {width} x {height}; both must be at least 1 pixel")


def _patches(rows: int, columns: int) -> PatchGrid:
    return PatchGrid(rows * PIXEL_SHUFFLE, columns * PIXEL_SHUFFLE)
