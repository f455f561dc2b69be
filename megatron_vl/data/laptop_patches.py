"""Tiles of which every patch says what it shows: what the laptop's encoder is pretrained on.

A released encoder has seen the world; the laptop's sees the laptop's material, drawn by the same
builders as the recipe's samples and from their training part alone. Each patch has three targets:
what stands at its left and at its right quarter point (a character, or the photograph, shot or
handwritten digit that the tile belongs to), and its colour. Two points, because letters are
narrower than a patch.

Drawn anew for every batch, about a millisecond a tile; nothing is stored.

Shapes: T tiles, P patches of a tile, F numbers of a patch.
"""

import string
from collections.abc import Callable
from random import Random
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from megatron_vl.data import laptop_clips, pictures
from megatron_vl.data.laptop_material import ocr_lines, two_or_three_words
from megatron_vl.data.pack import patches_of

BACKGROUND = "nothing"
CHARACTERS = string.digits + string.ascii_letters + string.punctuation
NAMES = (
    BACKGROUND,
    *CHARACTERS,
    *(photograph.name for photograph in pictures.PHOTOGRAPHS),
    *dict.fromkeys(shot.name for shot in laptop_clips.SHOTS),
)
"""What a point of a patch may show; a class is a place in this list."""

_CLASS_OF = {name: index for index, name in enumerate(NAMES)}
POINTS = (0.25, 0.75)
"""Where in a patch's width it is asked what stands there."""


class LabelledTile(NamedTuple):
    """An image of whole tiles, and the class at each point of each patch.

    image: any mode. classes: (patch rows, patch columns, 2).
    """

    image: Image.Image
    classes: NDArray[np.int64]


class PatchBatch(NamedTuple):
    """Tiles and their targets.

    patches_TPF: uint8. classes_TP2: places in NAMES. colours_TP: places in `pictures.COLOURS`.
    """

    patches_TPF: NDArray[np.uint8]
    classes_TP2: NDArray[np.int64]
    colours_TP: NDArray[np.int64]


def _all_of(image: Image.Image, name: str, patch: int) -> LabelledTile:
    grid = (image.height // patch, image.width // patch, len(POINTS))
    return LabelledTile(image, np.full(grid, _CLASS_OF[name]))


def _text(random: Random, split: str, tile: int, patch: int) -> LabelledTile:
    lines = (
        ocr_lines(random, split)
        if random.random() < 0.7
        else [" ".join(two_or_three_words(random, split))]
    )
    image, letters = pictures.render_letters(random, lines, tile)
    classes = np.zeros((image.height // patch, image.width // patch, len(POINTS)), dtype=np.int64)
    points_x = np.add.outer(np.arange(classes.shape[1]), POINTS) * patch
    points_y = (np.arange(classes.shape[0]) + 0.5) * patch
    for letter in letters:
        left, top, right, bottom = letter.box
        here_y, here_x = (
            (top <= points_y) & (points_y < bottom),
            (left <= points_x) & (points_x < right),
        )
        classes[here_y[:, None, None] & here_x[None]] = _CLASS_OF.get(letter.character, 0)
    return LabelledTile(image, classes)


def _digits(random: Random, split: str, tile: int, patch: int) -> LabelledTile:
    found, image = pictures.digit_row(random, split, random.choice((1, 2, 3)), tile)
    classes = np.array([_CLASS_OF[str(digit)] for digit in found]).repeat(tile // patch)
    grid = (image.height // patch, len(classes), len(POINTS))
    return LabelledTile(image, np.broadcast_to(classes[None, :, None], grid))


def _photograph(random: Random, split: str, tile: int, patch: int) -> LabelledTile:
    view = pictures.draw_view(random, split, tile)
    return _all_of(view.image, view.photograph.name, patch)


def _frame(random: Random, split: str, tile: int, patch: int) -> LabelledTile:
    name, image = laptop_clips.draw_frame(random, split, tile)
    return _all_of(image, name, patch)


_KINDS: tuple[tuple[Callable[[Random, str, int, int], LabelledTile], int], ...] = (
    (_text, 50),
    (_digits, 15),
    (_photograph, 20),
    (_frame, 15),
)


def draw_patches(
    random: Random, split: str, count: int, *, tile_size: int, patch_size: int
) -> PatchBatch:
    """`count` labelled tiles of a split, at most three of one image."""
    kinds, weights = zip(*_KINDS, strict=True)
    tiles: list[NDArray[np.uint8]] = []
    classes: list[NDArray[np.int64]] = []
    colours: list[NDArray[np.int64]] = []
    edge = tile_size // patch_size
    while len(tiles) < count:
        drawn = random.choices(kinds, weights)[0](random, split, tile_size, patch_size)
        image = drawn.image.convert("RGB")
        cells = [
            (row, col)
            for row in range(image.height // tile_size)
            for col in range(image.width // tile_size)
        ]
        for row, col in random.sample(cells, min(3, len(cells), count - len(tiles))):
            left, top = col * tile_size, row * tile_size
            cut = image.crop((left, top, left + tile_size, top + tile_size))
            tiles.append(np.asarray(cut).transpose(2, 0, 1))
            here = drawn.classes[row * edge : (row + 1) * edge, col * edge : (col + 1) * edge]
            classes.append(here.reshape(-1, len(POINTS)))
            colours.append(pictures.colour_indices(cut, edge, edge).flatten())
    patches_PF = patches_of(np.stack(tiles), patch_size)
    return PatchBatch(
        patches_PF.reshape(count, edge * edge, -1), np.stack(classes), np.stack(colours)
    )
