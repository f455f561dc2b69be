"""Pictures to normalised tiles for NemotronH_Nano_VL_V2, without torchvision.

An image is resized once, bicubically, to the grid of square tiles whose aspect ratio is nearest to
its own, cut row by row, and followed by a thumbnail of the whole where there is more than one tile.
A video frame is one tile.

Shapes: T tiles, H x W pixels, C colours, S a tile's edge.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from transformers import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import make_flat_list_of_images

from .grids import Grid, tile_grid


def upright_rgb(image: Any) -> Tensor:
    """A PIL image, array or tensor as uint8 (1, C, H, W) in channels-last memory."""
    if isinstance(image, Image.Image):
        pixels = np.array(_to_rgb(ImageOps.exif_transpose(image)))
    else:
        pixels = np.asarray(image)
        if pixels.shape[0] == 3 and pixels.shape[-1] != 3:
            pixels = np.moveaxis(pixels, 0, -1)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != 3:
        raise ValueError(
            f"an image is {pixels.dtype} {pixels.shape}; give PIL images or uint8 (H, W, 3)"
        )
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None]


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
    return image.convert("RGB")


def _resize(pixels_1CHW: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with antialiasing, the height first where that takes away more than twice as much.

    Both passes round to 8 bits, so their order shows; this is Pillow's.
    """
    rows, columns = pixels_1CHW.shape[-2:]
    if (rows, columns) == (height, width):
        return pixels_1CHW
    if height < rows and rows - height > 2 * (columns - width):
        pixels_1CHW = F.interpolate(
            pixels_1CHW, size=(height, columns), mode="bicubic", antialias=True
        )
    return F.interpolate(pixels_1CHW, size=(height, width), mode="bicubic", antialias=True)


class NemotronH_Nano_VL_V2_ImageProcessor(BaseImageProcessor):
    """Cuts and normalises pictures.

    Args:
        image_size: a tile's edge. [pixels]
        max_num_tiles: most tiles of an image, its thumbnail not counted.
        area_weighted: weigh area and ratio in the choice of the grid.
        use_thumbnail: add the thumbnail.
        norm_mean, norm_std: per colour, on a 0..1 scale.
        tokens_per_tile: image tokens a tile takes in the text.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012

    def __init__(
        self,
        image_size: int = 512,
        max_num_tiles: int = 12,
        area_weighted: bool = False,
        use_thumbnail: bool = True,
        norm_mean: Sequence[float] = (0.48145466, 0.4578275, 0.40821073),
        norm_std: Sequence[float] = (0.26862954, 0.26130258, 0.27577711),
        tokens_per_tile: int = 256,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.image_size = image_size
        self.max_num_tiles = max_num_tiles
        self.area_weighted = area_weighted
        self.use_thumbnail = use_thumbnail
        self.norm_mean = list(norm_mean)
        self.norm_std = list(norm_std)
        self.tokens_per_tile = tokens_per_tile

    def tiles(self, image: Any, max_num_tiles: int) -> Tensor:
        """Tiles of one image, uint8 (T, C, S, S)."""
        pixels, size = upright_rgb(image), self.image_size
        height, width = pixels.shape[-2:]
        grid: Grid = tile_grid(
            width,
            height,
            tile_size=size,
            max_tiles=max_num_tiles,
            area_weighted=self.area_weighted,
        )
        whole = _resize(pixels, size * grid.rows, size * grid.cols)
        cells = whole[0].unflatten(1, (grid.rows, size)).unflatten(3, (grid.cols, size))
        tiles_TCSS = cells.permute(1, 3, 0, 2, 4).flatten(0, 1)
        if grid.cells > 1 and self.use_thumbnail:
            tiles_TCSS = torch.cat([tiles_TCSS, _resize(pixels, size, size)])
        return tiles_TCSS

    def normalise(self, tiles_TCSS: Tensor) -> Tensor:
        """Float tiles with the mean taken out and the deviation divided by."""
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.norm_mean, self.norm_std))
        return (tiles_TCSS.float() - 255 * mean) / (255 * std)

    def preprocess(
        self,
        images: Any,
        max_num_tiles: int | None = None,
        return_tensors: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Tiles of all images, one after another.

        Returns:
            pixel_values (T, C, S, S), and num_tiles: how many of them each image has.
        """
        most = self.max_num_tiles if max_num_tiles is None else max_num_tiles
        cut = [self.tiles(image, most) for image in make_flat_list_of_images(images)]
        return BatchFeature(
            {
                "pixel_values": self.normalise(torch.cat(cut)),
                "num_tiles": [len(tiles) for tiles in cut],
            },
            tensor_type=return_tensors,
        )

    def preprocess_frames(self, frames: Sequence[Any]) -> Tensor:
        """One normalised tile a frame: (T, C, S, S)."""
        size = self.image_size
        resized = [_resize(upright_rgb(frame), size, size) for frame in frames]
        return self.normalise(torch.cat(resized))
