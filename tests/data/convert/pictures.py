"""Small images that look like something, in the formats and modes that sets hold, and clips."""

import io
from functools import lru_cache
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw, ImageFilter

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}
ORIENTATION = 0x0112


def picture(seed: int, width: int, height: int) -> Image.Image:
    """Soft noise with a few shapes over it, RGB."""
    random = np.random.default_rng(seed)
    coarse = random.integers(0, 256, (height // 6 + 2, width // 6 + 2, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = sorted(random.integers(0, width, 2)), sorted(random.integers(0, height, 2))
        colour = tuple(int(value) for value in random.integers(0, 256, 3))
        draw.ellipse((x[0], y[0], x[1], y[1]), fill=colour)
    return image.filter(ImageFilter.GaussianBlur(0.6))


def encoded(
    image: Image.Image, format_name: str = "JPEG", orientation: int = 1, mode: str = ""
) -> bytes:
    """The image in a format, turned by EXIF if asked."""
    stream = io.BytesIO()
    options: dict[str, object] = {}
    if orientation != 1:
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif
    if format_name == "JPEG":
        options["quality"] = 88
    (image.convert(mode) if mode else image).save(stream, format_name, **options)
    return stream.getvalue()


@lru_cache(maxsize=1)
def album() -> dict[str, bytes]:
    """Forty images by name: all formats, some grey, with palette or alpha, some turned."""
    files = {}
    random = np.random.default_rng(5)
    for index in range(40):
        format_name = FORMATS[index % len(FORMATS)] if index % 2 else "JPEG"
        mode = {3: "L", 7: "P", 9: "RGBA", 21: "L"}.get(index, "")
        mode = "" if format_name == "JPEG" and mode in ("P", "RGBA") else mode
        orientation = 6 if index in (10, 13) and format_name in ("JPEG", "PNG") else 1
        width, height = (int(value) for value in random.integers(24, 90, 2))
        data = encoded(picture(index, width, height), format_name, orientation, mode)
        files[f"part_{index % 3}/p{index:02d}.{SUFFIXES[format_name]}"] = data
    return files


def clip(
    seed: int, frames: int = 9, width: int = 64, height: int = 48, suffix: str = "mp4"
) -> bytes:
    """A short H.264 clip of a picture that slides."""
    stream = io.BytesIO()
    wide = np.asarray(picture(seed, width + 4 * frames, height))
    with av.open(stream, "w", format={"mp4": "mp4", "mkv": "matroska"}[suffix]) as container:
        video = container.add_stream("libx264", rate=5)
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        for index in range(frames):
            view = np.ascontiguousarray(wide[:, 4 * index : 4 * index + width])
            container.mux(video.encode(av.VideoFrame.from_ndarray(view, format="rgb24")))
        container.mux(video.encode())
    return stream.getvalue()


def write_files(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their names under a folder."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
