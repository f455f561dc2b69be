"""Real pictures inside installed packages: photographs, a scanned page, handwritten digits.

Views of the photographs are cut, mirrored and resized here, together with what can be said about
them from their pixels alone: main colours, brightness, the part of the photograph they show.
Training views come from the left seven tenths of each photograph, held-out views from the rest;
digits are held out by index. Text is rendered with the DejaVu fonts that matplotlib carries.
"""

import csv
import gzip
import io
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from megatron_vl.data.documents import installed_folder

TRAIN_PART = 0.7
"""Part of a photograph's width, from the left, that training views come from."""

FONTS = ("DejaVuSans", "DejaVuSerif", "DejaVuSansMono", "DejaVuSans-Bold", "DejaVuSerif-Bold")

_HELD_OUT_DIGITS = 300


@dataclass(frozen=True)
class Photograph:
    """A picture: package and file, what it shows in a word or two, and in a sentence's subject."""

    package: str
    file: str
    name: str
    subject: str


_SKIMAGE = "skimage/data"
_SKLEARN = "sklearn/datasets/images"

PHOTOGRAPHS = (
    Photograph(_SKIMAGE, "astronaut.png", "astronaut", "an astronaut in an orange suit"),
    Photograph(_SKIMAGE, "brick.png", "bricks", "a pavement of bricks"),
    Photograph(
        _SKIMAGE, "camera.png", "photographer", "a man looking through a camera on a tripod"
    ),
    Photograph(_SKIMAGE, "chelsea.png", "cat", "the face of a cat"),
    Photograph(_SKIMAGE, "coffee.png", "coffee", "a cup of coffee on a saucer"),
    Photograph(_SKIMAGE, "coins.png", "coins", "rows of old coins"),
    Photograph(_SKIMAGE, "color.png", "colour wheel", "a wheel of all colours on black"),
    Photograph(_SKIMAGE, "grass.png", "grass", "a lawn of grass"),
    Photograph(_SKIMAGE, "gravel.png", "gravel", "a bed of gravel"),
    Photograph(_SKIMAGE, "horse.png", "horse", "the black outline of a horse"),
    Photograph(_SKIMAGE, "hubble_deep_field.jpg", "galaxies", "galaxies in the night sky"),
    Photograph(_SKIMAGE, "ihc.png", "tissue", "stained tissue under a microscope"),
    Photograph(_SKIMAGE, "moon.png", "moon", "the surface of the moon"),
    Photograph(_SKIMAGE, "motorcycle_left.png", "motorcycle", "a red motorcycle in a workshop"),
    Photograph(_SKIMAGE, "retina.jpg", "retina", "the retina of an eye"),
    Photograph(_SKIMAGE, "rocket.jpg", "rocket", "a rocket on its launch pad"),
    Photograph(_SKLEARN, "china.jpg", "pagoda", "a Chinese pagoda above trees"),
    Photograph(_SKLEARN, "flower.jpg", "flower", "an orange flower"),
)

PAGE_LINES = (
    ("Region-based segmentation", (0, 6, 300, 36)),
    ("Let us first determine markers of the coins and the", (2, 46, 382, 66)),
    ("background. These markers are pixels that we can label", (2, 63, 382, 85)),
    ("unambiguously as either object or background. Here,", (2, 80, 382, 104)),
    ("the markers are found at the two extreme parts of the", (2, 97, 382, 121)),
    ("histogram of grey values:", (2, 114, 176, 139)),
)
"""The lines of the scanned page, read by eye, with boxes left, top, right, bottom. [pixels]"""

SHAPES = (
    ((1, 1), 10),
    ((2, 1), 4),
    ((1, 2), 2),
    ((2, 2), 3),
    ((3, 2), 2),
    ((4, 3), 1),
)
"""Columns and rows of tiles a view is made for, and how often. [tiles, weight]"""


@dataclass(frozen=True)
class View:
    """A cut of a photograph and what its pixels say."""

    photograph: Photograph
    image: Image.Image
    colours: tuple[str, ...]
    brightness: str
    part: str


@lru_cache(maxsize=64)
def load_picture(package: str, file: str) -> Image.Image:
    """A picture of a package as RGB, transparency over white, 640 pixels wide at most."""
    top, _, rest = package.partition("/")
    with Image.open(installed_folder(top) / rest / file) as image:
        colour = image.convert("RGBA")
    white = Image.new("RGBA", colour.size, (255, 255, 255, 255))
    picture = Image.alpha_composite(white, colour).convert("RGB")
    picture.thumbnail((640, 640))
    return picture


COLOURS = (
    "black",
    "white",
    "grey",
    "red",
    "brown",
    "orange",
    "yellow",
    "green",
    "blue",
    "purple",
)
"""Names of colours, as `colour_indices` counts them."""


def colour_indices(image: Image.Image, columns: int, rows: int) -> NDArray[np.int64]:
    """The colour of each cell of a grid laid over an image: (rows, columns), places in COLOURS."""
    pixels = np.asarray(image.resize((columns, rows)).convert("HSV")).astype(int)
    hue, saturation, value = pixels[..., 0] * 360 // 256, pixels[..., 1], pixels[..., 2]
    return np.select(
        [
            value < 50,
            (saturation < 45) & (value > 200),
            saturation < 45,
            (hue < 12) | (hue >= 340),
            (hue < 45) & (value < 150),
            hue < 45,
            hue < 68,
            hue < 165,
            hue < 260,
        ],
        range(len(COLOURS) - 1),
        default=len(COLOURS) - 1,
    )


def main_colours(image: Image.Image) -> tuple[str, ...]:
    """The one or two colour names that most pixels carry; the second needs a fifth of them."""
    counts = {
        COLOURS[index]: int(count)
        for index, count in enumerate(np.bincount(colour_indices(image, 24, 24).flatten()))
        if count
    }
    names = sorted(counts, key=lambda name: (-counts[name], name))
    second = len(names) > 1 and counts[names[1]] * 5 >= sum(counts.values())
    return tuple(names[: 2 if second else 1])


def brightness_word(image: Image.Image) -> str:
    """dark, mid-tone or bright, by the mean grey value."""
    mean = float(np.asarray(image.convert("L")).mean())
    return "dark" if mean < 80 else "bright" if mean > 150 else "mid-tone"


BLANK_SPREAD = 4.0
"""Standard deviation of grey under which a cut shows nothing worth a sentence. [grey values]"""
DRAWS = 100
"""Most cuts tried before one that shows something; blank margins are a few per cent of them."""


def draw_view(random: Random, split: str, tile_size: int) -> View:
    """A random view of a random photograph that shows something, not a blank margin."""
    for _ in range(DRAWS):
        view = _draw_cut(random, split, tile_size)
        if float(np.asarray(view.image.convert("L")).std()) >= BLANK_SPREAD:
            return view
    raise AssertionError(f"{DRAWS} cuts in a row were blank")


def _draw_cut(random: Random, split: str, tile_size: int) -> View:
    """A random view of a random photograph, sized to a whole number of tiles."""
    photograph = random.choice(PHOTOGRAPHS)
    picture = load_picture(photograph.package, photograph.file)
    shapes, weights = zip(*SHAPES, strict=True)
    cols, rows = random.choices(shapes, weights)[0]
    left = 0.0 if split == "train" else TRAIN_PART * picture.width
    right = TRAIN_PART * picture.width if split == "train" else float(picture.width)
    largest = min((right - left) / cols, picture.height / rows)
    edge = largest * random.uniform(0.6, 1.0)
    x = random.uniform(left, right - edge * cols)
    y = random.uniform(0.0, picture.height - edge * rows)
    box = (x, y, x + edge * cols, y + edge * rows)
    image = picture.resize((tile_size * cols, tile_size * rows), Image.Resampling.BICUBIC, box=box)
    if random.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    centre = (y + edge * rows / 2) / picture.height
    part = "upper" if centre < 0.4 else "lower" if centre > 0.6 else "middle"
    return View(photograph, image, main_colours(image), brightness_word(image), part)


@lru_cache(maxsize=64)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A DejaVu font of matplotlib. [size in pixels]"""
    folder = installed_folder("matplotlib") / "mpl-data" / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"{name}.ttf"), size)


@dataclass(frozen=True)
class Letter:
    """A character drawn in an image and the box it fills: left, top, right, bottom. [pixels]"""

    character: str
    box: tuple[float, float, float, float]


def render_lines(random: Random, lines: list[str], tile_size: int) -> Image.Image:
    """Lines of text on a canvas of at most 12 whole tiles, dark on light or the reverse."""
    return render_letters(random, lines, tile_size)[0]


def render_letters(
    random: Random, lines: list[str], tile_size: int
) -> tuple[Image.Image, list[Letter]]:
    """`render_lines`, and where each character of the lines stands."""
    name = random.choice(FONTS)
    # A letter of a single line is about as wide as the pixels of one visual token.
    biggest = tile_size // 2 if len(lines) == 1 else tile_size * 3 // 8
    size = random.randint(biggest * 3 // 4, biggest)
    while True:
        face = font(name, size)
        step = size + size // 3
        width = max(face.getlength(line) for line in lines) + size
        cols = max(1, -int(-width // tile_size))
        rows = max(1, -int(-(step * len(lines) + size // 2) // tile_size))
        if cols * rows <= 12 or size <= 8:
            break
        size -= 1
    ink, paper = random.randint(0, 70), random.randint(190, 255)
    if random.random() < 0.15:
        ink, paper = paper, ink
    canvas = Image.new("L", (tile_size * cols, tile_size * rows), paper)
    draw = ImageDraw.Draw(canvas)
    spare_x = canvas.width - width + size / 2
    spare_y = canvas.height - step * len(lines)
    x, y = size / 4 + random.random() * spare_x * 0.5, spare_y * random.uniform(0.3, 0.6)
    letters = []
    for index, line in enumerate(lines):
        top = y + index * step
        draw.text((x, top), line, fill=ink, font=face)
        edges = [x + face.getlength(line[:end]) for end in range(len(line) + 1)]
        letters += [
            Letter(character, (left, top, right, top + step))
            for character, (left, right) in zip(line, pairwise(edges), strict=True)
        ]
    return canvas, letters


def scanned_line(random: Random, split: str) -> tuple[str, Image.Image]:
    """A line of the scanned page and what it says; the last line is held out."""
    text, box = random.choice(PAGE_LINES[:-1]) if split == "train" else PAGE_LINES[-1]
    page = load_picture(_SKIMAGE, "page.png").convert("L")
    shift = [random.randint(-2, 2) for _ in box]
    left, top, right, bottom = (edge + move for edge, move in zip(box, shift, strict=True))
    cut = page.crop((max(0, left), max(0, top), min(page.width, right), min(page.height, bottom)))
    return text, cut.resize((cut.width * 2, cut.height * 2), Image.Resampling.BICUBIC)


@lru_cache(maxsize=1)
def digits() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The 1797 handwritten digits of scikit-learn: (N, 8, 8) grey values 0 ... 255, (N) digits."""
    file = installed_folder("sklearn") / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(file, "rt") as stream:
        rows = np.array([[float(cell) for cell in row] for row in csv.reader(stream)])
    pixels = np.clip(rows[:, :-1] * 16, 0, 255).astype(np.uint8).reshape(-1, 8, 8)
    return pixels, rows[:, -1].astype(np.int64)


def digit_row(
    random: Random, split: str, count: int, tile_size: int
) -> tuple[list[int], Image.Image]:
    """Handwritten digits side by side, one a tile, and which they are."""
    pixels, labels = digits()
    border = len(labels) - _HELD_OUT_DIGITS
    choose = range(border) if split == "train" else range(border, len(labels))
    chosen = [random.choice(choose) for _ in range(count)]
    canvas = Image.new("L", (tile_size * count, tile_size), 0)
    edge = tile_size * 7 // 8
    for column, index in enumerate(chosen):
        digit = Image.fromarray(pixels[index]).resize((edge, edge), Image.Resampling.BICUBIC)
        canvas.paste(digit, (tile_size * column + tile_size // 16, tile_size // 16))
    return [int(labels[index]) for index in chosen], canvas


def encode_jpeg(image: Image.Image) -> bytes:
    """JPEG bytes, quality 90."""
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes."""
    stream = io.BytesIO()
    image.save(stream, "PNG", compress_level=6)
    return stream.getvalue()
