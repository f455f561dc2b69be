"""Encoded images to uint8 tiles, or to one whole picture.

Decode, upright RGB, one bicubic resize to the whole grid, cut row by row, and a thumbnail of the
whole image last where there is more than one tile. Pixels stay uint8 (a quarter of the bytes of
float32); normalisation happens on the device, in the model.

JPEG goes through simplejpeg, everything else through Pillow; the resize is torch's uint8 bicubic
with antialiasing in channels-last memory, within 2/255 of the bicubic of Pillow 13 and several
times faster. Tiles are copied by NumPy: torch would wake a team of threads for each copy, which
costs a hundred times the copy itself while the trainer keeps the cores busy.

Images become RGB *before* the resize: palette and 1-bit images are interpolated like any other. Of
an animation the first frame is taken. Whatever Pillow cannot decode in full is refused, a file that
is cut off among it; so is an image of more pixels than Pillow's limit (178 million), which would
take half a gigabyte.
"""

import io

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from megatron_vl.sequence.grids import Grid

_ORIENTATION_TAG = 0x0112


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
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                pixels = _fast_jpeg(image, data)
                if pixels is not None:
                    return pixels
            return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except Exception as error:  # Pillow's plugins raise what their parsers happen to raise
        raise ValueError(f"cannot decode the image: {_words(error)}") from error


def _fast_jpeg(image: Image.Image, data: bytes) -> NDArray[np.uint8] | None:
    """Pixels of a JPEG that needs no turning and has no fault; Pillow judges all others."""
    if image.getexif().get(_ORIENTATION_TAG, 1) != 1:
        return None
    try:
        return simplejpeg.decode_jpeg(data, colorspace="RGB")
    except ValueError:
        return None


def _words(error: Exception) -> str:
    """An error's text, without the memory address that Pillow puts in this one."""
    return "no known format" if isinstance(error, UnidentifiedImageError) else str(error)


def _view(pixels_HWC: NDArray[np.uint8]) -> Tensor:
    """The same memory as (1, 3, H, W)."""
    return torch.from_numpy(np.require(pixels_HWC, requirements=["C", "W"])).permute(2, 0, 1)[None]


def _resize(pixels_1CHW: Tensor, width: int, height: int) -> Tensor:
    """Bicubic with antialiasing on uint8; a view of (H, W, 3) memory is channels-last as it is.

    Both passes round to 8 bits and clip, so their order shows at hard edges: torch shrinks or grows
    the width first; Pillow does the height first where that takes away more than twice as much.
    """
    rows, columns = pixels_1CHW.shape[-2:]
    if (columns, rows) == (width, height):
        return pixels_1CHW
    if height < rows and rows - height > 2 * (columns - width):
        pixels_1CHW = _interpolated(pixels_1CHW, columns, height)
    return _interpolated(pixels_1CHW, width, height)


def _interpolated(pixels_1CHW: Tensor, width: int, height: int) -> Tensor:
    return F.interpolate(pixels_1CHW, size=(height, width), mode="bicubic", antialias=True)


def cut_tiles(pixels_HWC: NDArray[np.uint8], grid: Grid, tile_size: int) -> Tensor:
    """Tiles of decoded pixels: (T, 3, S, S) uint8, row by row, the thumbnail last."""
    size = tile_size
    pixels = _view(pixels_HWC)
    whole = _resize(pixels, size * grid.cols, size * grid.rows).numpy()
    cells = whole.reshape(3, grid.rows, size, grid.cols, size).transpose(1, 3, 0, 2, 4)
    tiles_TCHW = np.empty((grid.num_tiles, 3, size, size), dtype=np.uint8)
    tiles_TCHW[: grid.cells] = cells.reshape(grid.cells, 3, size, size)
    if grid.cells > 1:
        tiles_TCHW[-1] = _resize(pixels, size, size)[0].numpy()
    return torch.from_numpy(tiles_TCHW)


def whole_picture(pixels_HWC: NDArray[np.uint8], width: int, height: int) -> Tensor:
    """Decoded pixels at another size as one visual unit: (1, 3, height, width) uint8."""
    return torch.from_numpy(np.ascontiguousarray(_resize(_view(pixels_HWC), width, height).numpy()))
