"""JPEG bytes to tiles: this project's path against Pillow and float32, one thread.

    python bench/images.py [--repeats N]

Reference: Pillow decodes, resizes (bicubic) and crops; every tile becomes float32 in 0 ... 1
(ToTensor) and is normalised. Here: `decode_image` and `cut_tiles`, which stop at uint8 because the
device normalises. CPU seconds, the two interleaved, the fastest of N runs each. The pictures are
noise with a photograph's spectrum (1/f), quality 90. Exits 1 where the path here is not twice as
fast.
"""

import argparse
import io
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from megatron_vl.data.tiling import cut_tiles, decode_image
from megatron_vl.sequence.grids import tile_grid

SIZES = ((1536, 1024), (1600, 1200), (3000, 2000))
TILE, MAX_TILES = 512, 12
MEAN = torch.tensor((0.48145466, 0.4578275, 0.40821073)).view(3, 1, 1)
STD = torch.tensor((0.26862954, 0.26130258, 0.27577711)).view(3, 1, 1)
WANTED = 2.0


def photograph(width: int, height: int) -> bytes:
    """A JPEG of noise whose spectrum falls like a photograph's."""
    random = np.random.default_rng(width)
    across = np.fft.fftfreq(width)[None, :]
    down = np.fft.fftfreq(height)[:, None]
    falling = 1 / np.maximum(np.hypot(across, down), 1 / max(width, height))
    channels = []
    for _ in range(3):
        spectrum = np.fft.fft2(random.standard_normal((height, width))) * falling
        channel = np.fft.ifft2(spectrum).real
        channels.append(np.clip(128 + 50 * channel / channel.std(), 0, 255))
    shared = channels[0]
    pixels = np.stack([0.8 * shared + 0.2 * channel for channel in channels], axis=-1)
    stream = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()


def reference(data: bytes) -> torch.Tensor:
    """Tiles by Pillow, as normalised float32."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    grid = tile_grid(*image.size, tile_size=TILE, max_tiles=MAX_TILES)
    whole = image.resize((TILE * grid.cols, TILE * grid.rows), Image.Resampling.BICUBIC)
    tiles = [
        whole.crop((TILE * col, TILE * row, TILE * (col + 1), TILE * (row + 1)))
        for row in range(grid.rows)
        for col in range(grid.cols)
    ]
    if grid.cells > 1:
        tiles.append(image.resize((TILE, TILE), Image.Resampling.BICUBIC))
    return torch.stack([_normalised(tile) for tile in tiles])


def _normalised(tile: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(tile)).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div(255).sub_(MEAN).div_(STD)


def here(data: bytes) -> torch.Tensor:
    """Tiles as the loader makes them."""
    pixels = decode_image(data)
    height, width = pixels.shape[:2]
    grid = tile_grid(width, height, tile_size=TILE, max_tiles=MAX_TILES)
    return cut_tiles(pixels, grid, TILE)


def fastest(actions: list[Callable[[], object]], repeats: int) -> list[float]:
    """Least CPU milliseconds of each action, taken in turn."""
    best = [float("inf")] * len(actions)
    for _ in range(repeats):
        for at, action in enumerate(actions):
            started = time.process_time()
            action()
            best[at] = min(best[at], 1000 * (time.process_time() - started))
    return best


def difference(data: bytes) -> int:
    """Largest difference of the two paths, in levels of 255."""
    levels = (reference(data) * STD + MEAN).mul(255).round()
    return int((levels - here(data).float()).abs().max())


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="JPEG bytes to tiles, against Pillow and float32")
    parser.add_argument("--repeats", type=int, default=15, help="runs of each; default 15")
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    print(f"CPU ms, one thread, fastest of {repeats}")
    print("size        grid  decode  here   Pillow+float  ratio  largest difference")
    slow = False
    for width, height in SIZES:
        data = photograph(width, height)
        grid = tile_grid(width, height, tile_size=TILE, max_tiles=MAX_TILES)
        actions: list[Callable[[], object]] = [
            lambda data=data: decode_image(data),  # type: ignore[misc]
            lambda data=data: here(data),  # type: ignore[misc]
            lambda data=data: reference(data),  # type: ignore[misc]
        ]
        decode, fast, pillow = fastest(actions, repeats)
        slow |= pillow < WANTED * fast
        print(
            f"{width}x{height}   {grid.cols}x{grid.rows}  {decode:6.1f}  {fast:5.1f}  "
            f"{pillow:12.1f}  {pillow / fast:5.2f}  {difference(data)}"
        )
    return int(slow)


if __name__ == "__main__":
    sys.exit(main())
