"""Encoded videos to uint8 frames.

Frames are found by their time stamps, so a file with a variable frame rate does not drift: frame k
of a clip's N is the picture on screen in the middle of the k-th of N equal parts of its length,
which in a file of constant rate is the k-th frame. The reader jumps ahead where the file's index
has a keyframe between where it stands and what it looks for, and decodes on otherwise; both ways
give the pixels of a full decode (a 600-second clip costs a quarter of one). Each frame is turned
upright and becomes one tile of the whole frame.

A file that ends before its header says is refused.

PyAV decodes with one thread here; the loader runs several samples side by side.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain

import av
import numpy as np
import torch
from av.container import InputContainer
from av.packet import Packet
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from torch import Tensor

from megatron_vl.data.headers import VideoHeader, open_video
from megatron_vl.data.tiling import whole_picture

SLACK = 0.5
"""Seconds that a file may end before its header says, before it counts as cut off."""


class _Reader:
    """Frames of a container's first video stream by ascending time stamps."""

    def __init__(self, container: InputContainer):
        if not container.streams.video:
            raise ValueError("the file has no video stream")
        self._container, self._stream = container, container.streams.video[0]
        self._stream.codec_context.thread_count = 1
        self.start = self._stream.start_time or 0
        self.time_base = Fraction(self._stream.time_base or 1)
        self._keys = [entry.timestamp for entry in self._stream.index_entries if entry.is_keyframe]
        self._frames = self._decode(container.demux(self._stream))
        self._shown: VideoFrame | None = None
        self._ahead = next(self._frames, None)

    def _decode(self, packets: Iterable[Packet], first: int | None = None) -> Iterator[VideoFrame]:
        """Frames from a stamp on: those shown before a keyframe may lack what they refer to."""
        for packet in packets:
            for frame in packet.decode():
                if first is None or _stamp(frame) >= first:
                    yield frame

    def at(self, stamp: Fraction) -> VideoFrame:
        """The frame on screen at a stamp, in units of the stream's time base.

        Raises:
            ValueError: the file ends well before it, or holds no frame.
        """
        self._jump(stamp)
        while self._ahead is not None and (self._shown is None or _stamp(self._ahead) <= stamp):
            self._shown, self._ahead = self._ahead, next(self._frames, None)
        if self._shown is None:
            raise ValueError("the video has no frame that can be decoded")
        if self._ahead is None:
            end = _stamp(self._shown) + (self._shown.duration or 0)
            if (stamp - end) * self.time_base > SLACK:
                seconds = float((end - self.start) * self.time_base)
                raise ValueError(
                    f"the video ends after {seconds:.2f} seconds, before its header says: it is "
                    "cut off"
                )
        return self._shown

    def _jump(self, stamp: Fraction) -> None:
        """Go to the last keyframe at or before the stamp, if it lies ahead.

        Indexes count in decoding order, so what they find may be shown after the stamp; then the
        keyframes before are tried, down to the first.
        """
        place = bisect_right(self._keys, stamp) - 1
        if self._ahead is None or place < 0 or self._keys[place] <= _stamp(self._ahead):
            return
        for goal in (int(stamp), *reversed(self._keys[: place + 1])):
            self._container.seek(goal, stream=self._stream)
            packets = self._container.demux(self._stream)
            packet = next(packets)
            first = _stamp(packet)
            if first <= stamp or goal == self._keys[0]:
                break
        self._frames = self._decode(chain([packet], packets), first)
        self._shown, self._ahead = None, next(self._frames, None)


def _stamp(item: VideoFrame | Packet) -> int:
    stamp = item.pts if item.pts is not None else item.dts
    if stamp is None:
        raise ValueError("a frame of the video has no time stamp")
    return int(stamp)


def read_frames(
    data: bytes, frames: Sequence[int], header: VideoHeader
) -> Iterator[NDArray[np.uint8]]:
    """Pixels of some frames of a video, upright RGB, (H, W, 3) uint8 each.

    Args:
        data: the file.
        frames: their numbers, ascending, below header.num_frames.
        header: what `frames` was chosen by.

    Raises:
        ValueError: the file cannot be decoded, or ends before its header says.
    """
    with open_video(data) as container:
        try:
            reader = _Reader(container)
            length = Fraction(header.duration) / reader.time_base
            for frame in frames:
                stamp = reader.start + length * (2 * frame + 1) / (2 * header.num_frames)
                yield _pixels(reader.at(stamp))
        except (av.error.FFmpegError, StopIteration) as error:
            raise ValueError(f"cannot decode the video: {error}") from error


def _pixels(frame: VideoFrame) -> NDArray[np.uint8]:
    """A frame's pixels as its file wants them turned."""
    pixels = frame.to_ndarray(format="rgb24").astype(np.uint8, copy=False)
    return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels


def tile_video(
    data: bytes, frames: Sequence[int], header: VideoHeader, *, tile_size: int
) -> Tensor:
    """Frames of a video as tiles of the whole frame: (F, 3, S, S) uint8, S = tile_size.

    Raises:
        ValueError: see `read_frames`.
    """
    tiles = np.empty((len(frames), 3, tile_size, tile_size), dtype=np.uint8)
    for tile, pixels in zip(tiles, read_frames(data, frames, header), strict=True):
        tile[:] = whole_picture(pixels, tile_size, tile_size)[0].numpy()
    return torch.from_numpy(tiles)
