"""Small videos, made for a test, whose frames say which they are."""

import io
from collections.abc import Sequence
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

WIDTH, HEIGHT = 96, 64


def numbered_frames(count: int, seed: int = 0) -> list[NDArray[np.uint8]]:
    """Frames (64, 96, 3): the number in eight black or white bars, noise above them."""
    random = np.random.default_rng(seed)
    frames = []
    for number in range(count):
        pixels = random.integers(90, 160, (HEIGHT, WIDTH, 3)).astype(np.uint8)
        for bit in range(8):
            pixels[HEIGHT // 2 :, bit * 12 : bit * 12 + 12] = 235 if number >> bit & 1 else 20
        frames.append(pixels)
    return frames


def number_of(pixels: NDArray[np.uint8]) -> int:
    """The number a decoded frame shows."""
    bars = pixels[HEIGHT * 5 // 8 :].mean(axis=(0, 2)).reshape(8, 12)[:, 3:9].mean(axis=1)
    return sum(1 << bit for bit, level in enumerate(bars) if level > 128)


def encode_video(
    frames: Sequence[NDArray[np.uint8]],
    *,
    rate: int = 25,
    codec: str = "libx264",
    container: str = "mp4",
    stamps: Sequence[int] | None = None,
    rotation: int = 0,
    muxer: dict[str, str] | None = None,
    **options: str,
) -> bytes:
    """The bytes of a video file.

    Args:
        stamps: of each frame, in milliseconds; None spaces them evenly.
        rotation: turned against the clock when shown. [degrees]
        muxer: options of the container.
        options: of the codec.
    """
    stream = io.BytesIO()
    with av.open(stream, "w", format=container, container_options=muxer or {}) as target:
        video = target.add_stream(codec, rate=rate, options=options)
        video.height, video.width = frames[0].shape[:2]
        video.pix_fmt = "yuv420p"
        if stamps is not None:
            video.codec_context.time_base = Fraction(1, 1000)
        if rotation:
            video.set_display_rotation(rotation)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if stamps is not None:
                frame.pts, frame.time_base = stamps[number], Fraction(1, 1000)
            target.mux(video.encode(frame))
        target.mux(video.encode())
    return stream.getvalue()


def decode_all(data: bytes) -> list[NDArray[np.uint8]]:
    """Every frame in order, by a plain sequential decode."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
