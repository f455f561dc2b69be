"""Tiles against Pillow on real pictures of every mode."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_vl.data.documents import installed_folder
from megatron_vl.data.tiling import cut_tiles, decode_image, image_size, tile_image
from megatron_vl.sequence.grids import Grid, tile_grid

PICTURES = [
    ("astronaut.png", 64),
    ("camera.png", 64),
    ("horse.png", 64),
    ("rocket.jpg", 64),
    ("chelsea.png", 128),
    ("page.png", 64),
]


def picture(name: str) -> bytes:
    return (installed_folder("skimage") / "data" / name).read_bytes()


def encoded(image: Image.Image, kind: str, **settings: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def reference_tiles(image: Image.Image, grid: Grid, size: int) -> np.ndarray:
    """Pillow only: resize, crop, thumbnail."""
    whole = image.resize((size * grid.cols, size * grid.rows), Image.Resampling.BICUBIC)
    boxes = [
        (size * col, size * row, size * (col + 1), size * (row + 1))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    tiles = [whole.crop(box) for box in boxes]
    if grid.cells > 1:
        tiles.append(image.resize((size, size), Image.Resampling.BICUBIC))
    return np.stack([np.asarray(tile).transpose(2, 0, 1) for tile in tiles])


@pytest.mark.parametrize(("name", "size"), PICTURES)
def test_within_two_levels_of_pillow(name: str, size: int) -> None:
    data = picture(name)
    with Image.open(io.BytesIO(data)) as image:
        colour = image.convert("RGBA")
    white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
    image = Image.alpha_composite(white, colour).convert("RGB")
    grid = tile_grid(*image.size, tile_size=size, max_tiles=12)
    tiles = tile_image(data, tile_size=size, max_tiles=12)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (grid.num_tiles, 3, size, size)
    assert tiles.is_contiguous()
    expected = reference_tiles(image, grid, size)
    assert np.abs(tiles.numpy().astype(int) - expected.astype(int)).max() <= 2
    assert image_size(data) == image.size


def test_order_is_row_by_row_with_the_thumbnail_last() -> None:
    pixels = np.zeros((20, 30, 3), dtype=np.uint8)
    for row in range(2):
        for col in range(3):
            pixels[row * 10 : row * 10 + 10, col * 10 : col * 10 + 10] = 40 * (row * 3 + col)
    tiles = cut_tiles(pixels, Grid(3, 2), 10)
    assert [int(tile[0, 5, 5]) for tile in tiles[:6]] == [0, 40, 80, 120, 160, 200]
    assert len(tiles) == 7
    assert (tiles[:6] == tiles[:6, :1, 5:6, 5:6]).all(), "no resize where the size matches"


MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"]


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    with Image.open(io.BytesIO(picture("chelsea.png"))) as image:
        small = image.convert("RGB").resize((90, 60))
    if mode == "I;16":
        wide = np.asarray(small.convert("L")).astype(np.uint16) * 257
        data = encoded(Image.fromarray(wide), "PNG")
        expected = np.asarray(small.convert("L").convert("RGB"))
    else:
        changed = small.convert(mode)
        data = encoded(changed, "TIFF" if mode == "CMYK" else "PNG")
        expected = np.asarray(changed.convert("RGB"))
    assert (decode_image(data) == expected).all()


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode_image(encoded(clear, "PNG")) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_rotation_of_the_header_is_applied(kind: str) -> None:
    image = Image.fromarray(np.arange(40 * 24 * 3).reshape(40, 24, 3).astype(np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    data = encoded(image, kind, exif=tags)
    assert image_size(data) == (40, 24)
    assert decode_image(data).shape == (24, 40, 3)


def test_jpeg_equals_pillow() -> None:
    with Image.open(io.BytesIO(picture("rocket.jpg"))) as image:
        assert (decode_image(picture("rocket.jpg")) == np.asarray(image)).all()


@pytest.mark.parametrize("data", [b"", b"no image", picture("rocket.jpg")[:40]])
def test_broken_images_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="image"):
        decode_image(data)
