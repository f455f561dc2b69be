"""Which frames of a video are shown and what is written before each. No pixel is read.

A clip is shown as frames taken evenly from its whole length: the middle frame of each of n equal
stretches. n is data.video.fps times the duration, at least min_frames, at most max_frames and the
frames there are; it follows from the header, so lengths and the embeddings that efficient video
sampling keeps are known before anything is decoded.

Every frame carries a label, `Frame 3 sampled at 1.24 seconds: `: frames are counted from 1, the
stamp is the frame's number in the file times the whole milliseconds of one frame, as the published
serving code has it (29.97 frames a second give 33 ms, so stamps run 1 % slow there).
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import FrameLabels
from megatron_vl.data.headers import VideoHeader
from megatron_vl.data.seeds import sample_seed
from megatron_vl.sequence.counts import evs_kept
from megatron_vl.sequence.visual import PatchGrid


@dataclass(frozen=True)
class Clip:
    """How a video is shown.

    grid: patches of a frame. frames: their numbers in the file, ascending. labels: what is written
    before each, separators included. kept: embeddings that stay.
    """

    grid: PatchGrid
    frames: tuple[int, ...]
    labels: tuple[str, ...]
    kept: int


def frame_numbers(header: VideoHeader, fps: float, fewest: int, most: int) -> tuple[int, ...]:
    """Numbers in the file, from 0, of the frames that are shown."""
    wanted = min(max(int(fps * header.duration), fewest), most, header.num_frames)
    return tuple((2 * at + 1) * header.num_frames // (2 * wanted) for at in range(wanted))


def frame_labels(frames: Sequence[int], fps: float, style: FrameLabels) -> tuple[str, ...]:
    """The text in front of each frame. `fps` is the file's own. [frames a second]"""
    milliseconds = int(1000 / fps)
    separator = "\n" if style is FrameLabels.newline else ""
    return tuple(
        f"{separator if at else ''}Frame {at + 1} sampled at "
        f"{frame * milliseconds / 1000:.2f} seconds: "
        for at, frame in enumerate(frames)
    )


@dataclass(frozen=True)
class VideoRules:
    """`data.video` of a stage. [frames a second; frames; frames; ; fraction]

    evs_rate: one rate, or the two ends of a range. seed: of the draw from it.
    """

    fps: float = 2.0
    min_frames: int = 8
    max_frames: int = 128
    labels: FrameLabels = FrameLabels.newline
    evs_rate: tuple[float, ...] = (0.0,)
    seed: int = 0

    @classmethod
    def of(cls, config: StageConfig) -> "VideoRules":
        """The rules of a stage; the seed only where something is drawn."""
        video = config.data.video
        rates = tuple(dict.fromkeys(video.evs_rate))
        return cls(
            fps=video.fps,
            min_frames=video.min_frames,
            max_frames=video.max_frames,
            labels=video.labels,
            evs_rate=rates,
            seed=config.train.seed if len(rates) > 1 else 0,
        )

    def limits(self) -> tuple[int, ...]:
        """Most frames of a clip, then what a sample that is too long falls back to: halves."""
        limits = [self.max_frames]
        while limits[-1] > self.min_frames:
            limits.append(max(limits[-1] // 2, self.min_frames))
        return tuple(limits)

    def rate(self, source: str, key: str) -> float:
        """The part of a sample's videos that is pruned, the same in every epoch.

        Evenly spread over the range, by run seed, source and key alone.
        """
        low, high = self.evs_rate[0], self.evs_rate[-1]
        if low == high:
            return low
        return low + (high - low) * sample_seed(self.seed, source, key, 0) / 2**64

    def clip(self, header: VideoHeader, limit: int, grid: PatchGrid, rate: float) -> Clip:
        """How a video is shown: at most `limit` frames of `grid`, the part `rate` pruned."""
        frames = frame_numbers(header, self.fps, self.min_frames, limit)
        return Clip(
            grid=grid,
            frames=frames,
            labels=frame_labels(frames, header.fps, self.labels),
            kept=evs_kept(len(frames), grid.tokens, rate),
        )
