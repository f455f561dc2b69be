"""Where pictures and videos stand in a token row.

A visual unit is one picture the encoder sees: a tile, a video frame, or a whole image at its native
resolution. Its patches form a grid; pixel shuffle folds 2 x 2 of them into one visual embedding. An
image's embeddings stand in one run, unit after unit. A video's stand in one run a frame, with the
frame's label before and its end tag behind; efficient video sampling (EVS, arXiv 2510.14624) keeps
a number of them that is fixed beforehand for the whole video, while which ones, and so how many a
frame keeps, is known only after the encoder. Until then a video holds reserved places: the first
frames in full.

Shape suffixes: F frames of a video, K embeddings it keeps, X text tokens of its span. Integers
only: no torch.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megatron_vl.sequence.counts import PIXEL_SHUFFLE


class PatchGrid(NamedTuple):
    """Patches of one visual unit."""

    rows: int
    columns: int

    @property
    def patches(self) -> int:
        """Encoder patches."""
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        """Visual embeddings; an odd edge is padded by one row or column of zeros."""
        return -(-self.rows // PIXEL_SHUFFLE) * -(-self.columns // PIXEL_SHUFFLE)


@dataclass(frozen=True)
class ImageSpan:
    """One image: `start` is its first embedding's place, grids are its units in order."""

    start: int
    grids: tuple[PatchGrid, ...]

    @property
    def tokens(self) -> int:
        """Embeddings of all its units."""
        return sum(grid.tokens for grid in self.grids)


@dataclass(frozen=True)
class VideoSpan:
    """One video, from its first frame's label to its last frame's end tag.

    start: place of the first label's first token.
    grid: patches of a frame, the same for all.
    before_F, after_F: text tokens in front of a frame's embeddings (label and start tag) and behind
        them (end tag, and what separates frames).
    kept: embeddings that stay, at least one frame's, at most all.
    """

    start: int
    grid: PatchGrid
    before_F: tuple[int, ...]
    after_F: tuple[int, ...]
    kept: int

    def __post_init__(self) -> None:
        assert len(self.before_F) == len(self.after_F) > 0
        assert self.grid.tokens <= self.kept <= self.num_frames * self.grid.tokens

    @property
    def num_frames(self) -> int:
        """Frames."""
        return len(self.before_F)

    @property
    def pruned(self) -> bool:
        """Some embeddings are dropped, so that their places wait for the encoder."""
        return self.kept < self.num_frames * self.grid.tokens

    @property
    def length(self) -> int:
        """Tokens of the span."""
        return sum(self.before_F) + self.kept + sum(self.after_F)


def reserved_counts(num_frames: int, tokens_per_frame: int, kept: int) -> list[int]:
    """Embeddings of each frame before EVS has chosen: the first frames in full."""
    return [
        min(tokens_per_frame, max(0, kept - frame * tokens_per_frame))
        for frame in range(num_frames)
    ]


def video_places(video: VideoSpan) -> NDArray[np.int64]:
    """Places (K,) of the reserved embeddings, from the span's start."""
    counts = reserved_counts(video.num_frames, video.grid.tokens, video.kept)
    places = []
    at = 0
    for before, count, after in zip(video.before_F, counts, video.after_F, strict=True):
        at += before
        places.append(np.arange(at, at + count))
        at += count + after
    return np.concatenate(places).astype(np.int64)


@dataclass(frozen=True)
class VideoOrder:
    """What the host knows of the order inside a pruned video's span.

    Text token x stands behind x text tokens and the embeddings of frames_before_X[x] frames;
    an embedding of frame f stands behind text_before_F[f] text tokens. How many embeddings a frame
    keeps is all that is missing.

    text_places_X, embedding_places_K: reserved places, from the span's start.
    """

    text_places_X: NDArray[np.int64]
    frames_before_X: NDArray[np.int64]
    embedding_places_K: NDArray[np.int64]
    text_before_F: NDArray[np.int64]


def video_order(video: VideoSpan) -> VideoOrder:
    """The order inside a video's span, as far as it is known before the encoder."""
    embedding_places_K = video_places(video)
    before_F, after_F = np.array(video.before_F), np.array(video.after_F)
    frames = np.arange(video.num_frames)
    texts = np.stack([before_F, after_F], axis=1).ravel()
    return VideoOrder(
        text_places_X=np.setdiff1d(np.arange(video.length), embedding_places_K),
        frames_before_X=np.repeat(np.stack([frames, frames + 1], axis=1).ravel(), texts),
        embedding_places_K=embedding_places_K,
        text_before_F=np.cumsum(before_F) + np.cumsum(after_F) - after_F,
    )
