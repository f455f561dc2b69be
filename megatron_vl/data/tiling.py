"""Encoded images to uint8 tiles.

Decode, upright RGB, one bicubic resize to the whole grid, cut row by row, and a thumbnail of the
whole image last where there is more than one tile. Tiles stay uint8 (a quarter of the bytes of
float32); normalisation happens on the device, in the model.

JPEG goes through simplejpeg, everything else through Pillow; the resize is torch's uint8 bicubic
with antialiasing in channels-last memory, within 2/255 of Pillow's bicubic and several times
faster. Tiles are copied by NumPy: torch would wake a team of threads for each copy, which costs a
hundred times the copy itself while the trainer keeps the cores busy.

Images become RGB *before* the resize: palette and 1-bit images are interpolated like any
other.
"""

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from torch import Tensor

from megatron_vl.sequence.grids import Grid, tile_grid

_ORIENTATION_TAG = 0x0112
_TRANSPOSED = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def image_size(data: bytes) -> tuple[int, int]:
    """Width and height of the upright image, from its header alone. [pixels]

    Raises:
        ValueError: the bytes are no image that can be read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            width, height = image.size
            turned = image.getexif().get(_ORIENTATION_TAG, 1) in _TRANSPOSED
    except OSError as error:
        raise ValueError(f"cannot read the image's header: {error}") from error
    return (height, width) if turned else (width, height)


def _to_rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB: transparency over white, 16-bit and float samples scaled, palettes looked up."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I", "F"):
        samples = np.asarray(image).astype(np.float64)
        if image.mode == "F":
            low, high = float(samples.min()), float(samples.max())
            samples = (samples - low) / max(high - low, 1e-12) * 65535.0
        scaled = np.clip(np.rint(samples / 257.0), 0, 255).astype(np.uint8)
        return Image.fromarray(scaled).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        colour = image.convert("RGBA")
        white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, colour).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def decode_image(data: bytes) -> NDArray[np.uint8]:
    """Pixels of an encoded image, upright RGB, (H, W, 3) uint8.

    Raises:
        ValueError: the bytes are no image that can be decoded.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            orientation = image.getexif().get(_ORIENTATION_TAG, 1)
            if image.format == "JPEG" and image.mode in ("RGB", "L") and orientation == 1:
                return simplejpeg.decode_jpeg(data, colorspace="RGB")
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot decode the image: {error}") from error


def _resize(pixels_1CHW: Tensor, width: int, height: int) -> Tensor:
    """Bicubic with antialiasing on uint8; a view of (H, W, 3) memory is channels-last as it is."""
    if tuple(pixels_1CHW.shape[-2:]) == (height, width):
        return pixels_1CHW
    return F.interpolate(pixels_1CHW, size=(height, width), mode="bicubic", antialias=True)


def cut_tiles(pixels_HWC: NDArray[np.uint8], grid: Grid, tile_size: int) -> Tensor:
    """Tiles of decoded pixels: (T, 3, S, S) uint8, row by row, the thumbnail last."""
    size = tile_size
    pixels = torch.from_numpy(np.ascontiguousarray(pixels_HWC)).permute(2, 0, 1)[None]
    whole = _resize(pixels, size * grid.cols, size * grid.rows).numpy()
    cells = whole.reshape(3, grid.rows, size, grid.cols, size).transpose(1, 3, 0, 2, 4)
    tiles_TCHW = np.empty((grid.num_tiles, 3, size, size), dtype=np.uint8)
    tiles_TCHW[: grid.cells] = cells.reshape(grid.cells, 3, size, size)
    if grid.cells > 1:
        tiles_TCHW[-1] = _resize(pixels, size, size)[0].numpy()
    return torch.from_numpy(tiles_TCHW)


def tile_image(data: bytes, *, tile_size: int, max_tiles: int) -> Tensor:
    """Tiles of an encoded image: (T, 3, S, S) uint8, S = tile_size.

    Raises:
        ValueError: the bytes are no image that can be decoded.
    """
    pixels_HWC = decode_image(data)
    height, width = pixels_HWC.shape[:2]
    grid = tile_grid(width, height, tile_size=tile_size, max_tiles=max_tiles)
    return cut_tiles(pixels_HWC, grid, tile_size)
