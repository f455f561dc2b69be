"""Encoded images of every mode and form that a data set may hold, for the tiling tests."""

import io
from collections.abc import Iterator
from functools import lru_cache
from random import Random

import numpy as np
from PIL import Image, ImageOps

from megatron_vl.data.documents import installed_folder

COUNT = 200
EXTREMES = ((1, 1), (1, 10000), (10000, 1), (2, 3), (700, 20))
_ORIENTATION = 0x0112


@lru_cache(maxsize=1)
def _photographs() -> list[Image.Image]:
    folder = installed_folder("skimage") / "data"
    return [Image.open(folder / name).convert("RGB") for name in ("chelsea.png", "rocket.jpg")]


def _pixels(random: Random, size: tuple[int, int]) -> Image.Image:
    """Part of a photograph, noise of full contrast (the hardest to resize alike), or a ramp."""
    width, height = size
    kind = random.random()
    if kind < 0.5:
        photo = random.choice(_photographs())
        left, top = random.random() * photo.width / 2, random.random() * photo.height / 2
        return photo.resize(size, box=(left, top, photo.width, photo.height))
    generator = np.random.default_rng(random.randrange(1 << 30))
    if kind < 0.8:
        noise = generator.integers(0, 2, (height, width, 3)) * 255
        return Image.fromarray(noise.astype(np.uint8))
    ramp = np.linspace(0, 255, height * width * 3).reshape(height, width, 3)
    return Image.fromarray(ramp.astype(np.uint8))


def saved(image: Image.Image, kind: str, **settings: object) -> bytes:
    """The bytes of an image file."""
    stream = io.BytesIO()
    image.save(stream, kind, **settings)
    return stream.getvalue()


def _grey16(image: Image.Image) -> Image.Image:
    grey = np.asarray(image.convert("L")).astype(np.uint16)
    return Image.fromarray(grey * 256 + grey[::-1, ::-1])


def _with_alpha(image: Image.Image, mode: str) -> Image.Image:
    result = image.convert("RGBA")
    result.putalpha(ImageOps.mirror(image.convert("L")))
    return result.convert(mode)


def _turned(image: Image.Image, random: Random) -> Image.Exif:
    tags = Image.Exif()
    tags[_ORIENTATION] = random.randint(2, 8)
    return tags


FORMS = {
    "jpeg": lambda image, random: saved(image, "JPEG", quality=random.randint(60, 98)),
    "jpeg grey": lambda image, random: saved(image.convert("L"), "JPEG"),
    "jpeg progressive": lambda image, random: saved(image, "JPEG", progressive=True),
    "jpeg cmyk": lambda image, random: saved(image.convert("CMYK"), "JPEG", quality=90),
    "jpeg turned": lambda image, random: saved(image, "JPEG", exif=_turned(image, random)),
    "png": lambda image, random: saved(image, "PNG"),
    "png 1 bit": lambda image, random: saved(image.convert("1"), "PNG"),
    "png grey": lambda image, random: saved(image.convert("L"), "PNG"),
    "png grey alpha": lambda image, random: saved(_with_alpha(image, "LA"), "PNG"),
    "png palette": lambda image, random: saved(image.convert("P"), "PNG"),
    "png palette, one clear": lambda image, random: saved(
        image.quantize(16), "PNG", transparency=3
    ),
    "png alpha": lambda image, random: saved(_with_alpha(image, "RGBA"), "PNG"),
    "png 16 bit": lambda image, random: saved(_grey16(image), "PNG"),
    "png turned": lambda image, random: saved(image, "PNG", exif=_turned(image, random)),
    "tiff cmyk": lambda image, random: saved(image.convert("CMYK"), "TIFF"),
    "tiff 16 bit": lambda image, random: saved(_grey16(image), "TIFF"),
    "tiff two pages": lambda image, random: saved(
        image, "TIFF", save_all=True, append_images=[ImageOps.invert(image)]
    ),
    "gif animated": lambda image, random: saved(
        image, "GIF", save_all=True, append_images=[ImageOps.invert(image)], duration=90
    ),
    "webp animated": lambda image, random: saved(
        image, "WEBP", save_all=True, append_images=[ImageOps.invert(image)], duration=90
    ),
    "webp alpha": lambda image, random: saved(_with_alpha(image, "RGBA"), "WEBP", lossless=True),
    "bmp": lambda image, random: saved(image, "BMP"),
}
"""How to make a file of each form from an RGB image."""


def gallery() -> Iterator[tuple[str, bytes]]:
    """COUNT files, each form in turn; extreme sizes first."""
    random = Random(23)
    forms = list(FORMS.items())
    sizes = [size for size in EXTREMES for _ in forms]
    for number in range(COUNT):
        name, make = forms[number % len(forms)]
        if number < len(sizes):
            size = sizes[number]
        else:
            size = random.randint(1, 260), random.randint(1, 260)
        yield f"{name} {size[0]}x{size[1]}", make(_pixels(random, size), random)


def reference_rgb(data: bytes) -> Image.Image:
    """What an image shows, by Pillow alone: first frame, upright, over white, 8 bits."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    if image.mode.startswith("I"):
        grey = np.rint(np.asarray(image) * (255 / 65535)).astype(np.uint8)
        return Image.fromarray(np.stack([grey] * 3, axis=-1))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image)
        image = white
    return image.convert("RGB")
