"""Tiles against Pillow on real pictures of every mode."""

import io
import struct
import zlib
from random import Random

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from megatron_vl.data.documents import installed_folder
from megatron_vl.data.headers import image_header
from megatron_vl.data.tiling import cut_tiles, decode_image, whole_picture
from megatron_vl.sequence.grids import Grid, tile_grid
from tests.data.gallery import COUNT, FORMS, gallery, reference_rgb, saved

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


def size_of(data: bytes) -> tuple[int, int]:
    header = image_header(data)
    return header.width, header.height


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


def tile_image(data: bytes, size: int, *, area_weighted: bool = False) -> torch.Tensor:
    pixels = decode_image(data)
    height, width = pixels.shape[:2]
    grid = tile_grid(width, height, tile_size=size, max_tiles=12, area_weighted=area_weighted)
    return cut_tiles(pixels, grid, size)


def far(one: np.ndarray, two: np.ndarray) -> int:
    """The largest difference, in levels of 255."""
    return int(np.abs(one.astype(int) - two.astype(int)).max())


@pytest.mark.parametrize(("name", "size"), PICTURES)
def test_within_two_levels_of_pillow(name: str, size: int) -> None:
    data = picture(name)
    image = reference_rgb(data)
    grid = tile_grid(*image.size, tile_size=size, max_tiles=12)
    tiles = tile_image(data, size)
    assert tiles.dtype == torch.uint8
    assert tiles.shape == (grid.num_tiles, 3, size, size)
    assert tiles.is_contiguous()
    assert far(tiles.numpy(), reference_tiles(image, grid, size)) <= 2
    assert size_of(data) == image.size


def test_200_images_of_all_forms_are_within_two_levels_of_pillow() -> None:
    """Photographs, ramps and black-and-white noise in every form, from 1x1 to 1x10000 pixels."""
    seen, clear = set(), 0
    for name, data in gallery():
        image = reference_rgb(data)
        grid = tile_grid(*image.size, tile_size=64, max_tiles=12)
        tiles = tile_image(data, 64).numpy()
        assert far(tiles, reference_tiles(image, grid, 64)) <= 2, name
        assert size_of(data) == image.size, name
        seen.add(name)
        clear += tiles.std() > 8
    assert len(seen) == COUNT == 200
    assert clear > 150, "most show something, the others are single pixels"


@pytest.mark.parametrize("area_weighted", [False, True])
def test_the_choice_of_grid_reaches_the_pixels(area_weighted: bool) -> None:
    image = Image.fromarray(np.random.default_rng(3).integers(0, 256, (88, 88, 3), dtype=np.uint8))
    tiles = tile_image(saved(image, "PNG"), 64, area_weighted=area_weighted)
    assert len(tiles) == (5 if area_weighted else 1)


@pytest.mark.parametrize(("width", "height"), [(48, 32), (16, 160), (200, 133)])
def test_whole_pictures_are_within_two_levels_of_pillow(width: int, height: int) -> None:
    image = reference_rgb(picture("chelsea.png"))
    unit = whole_picture(np.asarray(image), width, height)
    expected = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    assert unit.shape == (1, 3, height, width)
    assert far(unit[0].numpy(), expected.transpose(2, 0, 1)) <= 2


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
        data = saved(Image.fromarray(wide), "PNG")
        expected = np.asarray(small.convert("L").convert("RGB"))
    else:
        changed = small.convert(mode)
        data = saved(changed, "TIFF" if mode == "CMYK" else "PNG")
        expected = np.asarray(changed.convert("RGB"))
    assert (decode_image(data) == expected).all()


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert (decode_image(saved(clear, "PNG")) == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_rotation_of_the_header_is_applied(kind: str) -> None:
    image = Image.fromarray(np.arange(40 * 24 * 3).reshape(40, 24, 3).astype(np.uint8))
    tags = Image.Exif()
    tags[0x0112] = 6
    data = saved(image, kind, exif=tags)
    assert size_of(data) == (40, 24)
    assert decode_image(data).shape == (24, 40, 3)


def test_jpeg_equals_pillow() -> None:
    with Image.open(io.BytesIO(picture("rocket.jpg"))) as image:
        assert (decode_image(picture("rocket.jpg")) == np.asarray(image)).all()


def test_an_animation_shows_its_first_frame() -> None:
    first = Image.new("RGB", (20, 10), (250, 10, 10))
    second = Image.new("RGB", (20, 10), (10, 10, 250))
    for kind in ("GIF", "WEBP"):
        data = saved(first, kind, save_all=True, append_images=[second], duration=50)
        assert far(decode_image(data), np.asarray(first)) <= 3


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a", picture("rocket.jpg")[:40]])
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="cannot decode the image"):
        decode_image(data)


@pytest.mark.parametrize("form", sorted(FORMS))
def test_files_that_are_cut_off_are_refused_as_pillow_refuses_them(form: str) -> None:
    image = reference_rgb(picture("chelsea.png")).resize((120, 80))
    data = FORMS[form](image, Random(5))
    refused = 0
    for part in (0.1, 0.4, 0.7, 0.9, 0.99):
        cut = data[: int(len(data) * part)]
        try:
            expected = np.asarray(reference_rgb(cut))
        except Exception:
            with pytest.raises(ValueError, match="cannot decode the image"):
                decode_image(cut)
            refused += 1
        else:
            assert (decode_image(cut) == expected).all()
    assert refused >= 2


def test_a_jpeg_with_stray_bytes_is_decoded_by_pillow() -> None:
    """The fast decoder stops at the smallest fault; Pillow has the last word."""
    data = picture("rocket.jpg")
    place = data.index(b"\xff\xdb")
    stray = data[:place] + b"\0\0" + data[place:]
    with pytest.raises(ValueError, match="extraneous"):
        simplejpeg.decode_jpeg(stray)
    assert (decode_image(stray) == decode_image(data)).all()


def test_a_picture_too_large_to_decode_is_refused_by_its_header() -> None:
    small = bytearray(saved(Image.new("L", (8, 8)), "PNG"))
    small[16:24] = struct.pack(">II", 20000, 20000)
    small[29:33] = struct.pack(">I", zlib.crc32(small[12:29]))
    with pytest.raises(ValueError, match=r"400000000 pixels\) exceeds limit of 178956970"):
        decode_image(bytes(small))
