"""Reading frames of video: jumping ahead against decoding everything, one thread.

    python bench/video.py [--seconds N] [--repeats N]

Three made clips (drifting noise, H.264, 25 frames a second, 640x360): a minute, a minute with one
keyframe, and a long one. The same frames are taken by `read_frames`, which jumps over what it does
not need, and by a plain decode of the whole file. CPU seconds, interleaved, the fastest of N runs;
`header` is what a length table costs. Exits 1 where the frames differ.
"""

import argparse
import io
import sys
import time
from collections.abc import Sequence

import av
import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.frames import frame_numbers
from megatron_vl.data.headers import VideoHeader, video_header
from megatron_vl.data.video import read_frames, tile_video

WIDTH, HEIGHT, RATE = 640, 360, 25


def make(seconds: int, keyframes: int) -> bytes:
    """A clip of drifting noise with a keyframe every so many frames."""
    random = np.random.default_rng(seconds)
    coarse = random.integers(0, 256, (HEIGHT // 8, WIDTH // 4, 3)).astype(np.uint8)
    canvas = coarse.repeat(8, axis=0).repeat(8, axis=1)
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as target:
        options = {"preset": "ultrafast", "g": str(keyframes), "sc_threshold": "0"}
        video = target.add_stream("libx264", rate=RATE, options=options)
        video.width, video.height, video.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(seconds * RATE):
            shift = number % WIDTH
            pixels = np.ascontiguousarray(canvas[:, shift : shift + WIDTH])
            target.mux(video.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        target.mux(video.encode())
    return stream.getvalue()


def whole(data: bytes, wanted: Sequence[int]) -> list[NDArray[np.uint8]]:
    """The frames of a plain decode; only those wanted are converted."""
    chosen = set(wanted)
    with av.open(io.BytesIO(data), "r") as container:
        container.streams.video[0].codec_context.thread_count = 1
        return [
            frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
            for number, frame in enumerate(container.decode(video=0))
            if number in chosen
        ]


def measure(data: bytes, header: VideoHeader, wanted: Sequence[int], repeats: int) -> list[float]:
    """Least CPU seconds of header, frames, tiles of the frames, and whole decode, in turn."""
    actions = (
        lambda: video_header(data),
        lambda: list(read_frames(data, wanted, header)),
        lambda: tile_video(data, wanted, header, tile_size=512),
        lambda: whole(data, wanted),
    )
    best = [float("inf")] * len(actions)
    for _ in range(repeats):
        for at, action in enumerate(actions):
            started = time.process_time()
            action()
            best[at] = min(best[at], time.process_time() - started)
    return best


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="frames of video: jumping against decoding all")
    parser.add_argument("--seconds", type=int, default=600, help="of the long clip; default 600")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; default 3")
    args = parser.parse_args()
    print(f"CPU seconds, one thread, fastest of {args.repeats}")
    print("clip, keyframe every   frames  header  read_frames  with tiles  whole decode  ratio")
    wrong = False
    for seconds, keyframes in ((60, 50), (60, 10**6), (args.seconds, 50)):
        data = make(seconds, keyframes)
        header = video_header(data)
        wanted = frame_numbers(header, 2.0, 8, 128)
        found, expected = list(read_frames(data, wanted, header)), whole(data, wanted)
        wrong |= not all((a == b).all() for a, b in zip(found, expected, strict=True))
        first, frames, tiles, full = measure(data, header, wanted, args.repeats)
        every = f"{keyframes / RATE:.0f} s" if keyframes < seconds * RATE else "none"
        print(
            f"{seconds:4d} s, {every:>14}  {len(wanted):6d}  {first:6.4f}  {frames:11.2f}  "
            f"{tiles:10.2f}  {full:12.2f}  {full / frames:5.2f}"
        )
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
