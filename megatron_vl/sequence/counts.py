"""How many decoder tokens a tile and an image take.

One tile of S pixels has (S / patch)^2 patches; pixel shuffle folds 2 x 2 of them into one token.
An image stands in the text as `<img>`, one `<image>` for every token of all its tiles, `</img>`.
"""

from collections.abc import Iterable

from megatron_vl.sequence.grids import num_tiles

PIXEL_SHUFFLE = 2
"""Edge of the square of patches that becomes one token."""

TAGS_PER_IMAGE = 2
"""`<img>` and `</img>`."""


def tokens_per_tile(tile_size: int, patch_size: int) -> int:
    """Decoder tokens of one tile.

    Raises:
        ValueError: the tile is not a whole number of 2 x 2 patch squares.
    """
    step = patch_size * PIXEL_SHUFFLE
    if patch_size < 1 or tile_size < step or tile_size % step:
        nearest = max(1, round(tile_size / max(step, 1))) * step
        raise ValueError(
            f"tile_size is {tile_size} with patches of {patch_size}; it must be a multiple of "
            f"{step}, the nearest is {nearest}"
        )
    return (tile_size // step) ** 2


def image_token_counts(
    sizes: Iterable[tuple[int, int]], *, tile_size: int, patch_size: int, max_tiles: int
) -> list[int]:
    """`<image>` tokens of each image, tags not counted; sizes are (width, height) in pixels."""
    per_tile = tokens_per_tile(tile_size, patch_size)
    return [
        per_tile * num_tiles(width, height, tile_size=tile_size, max_tiles=max_tiles)
        for width, height in sizes
    ]
