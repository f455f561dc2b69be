"""The index map: everything of a pack that has a position, computed once.

A pack is a row of L tokens made of whole documents (encoded samples), one after the other, each
padded to a multiple of `alignment`, with padding at the end as a document of its own. `lay_out`
turns the documents into labels, loss weights, document ids, boundaries and the places of visual
embeddings; every consumer (embedding, attention, state-space scan, loss, shards) reads these arrays
and none recomputes them. Only which embeddings of a pruned video stay, and so the order inside its
span, is filled in later (see `visual.py`); boundaries, labels and shards do not move. The decoder
has no position embeddings: where a token stands in its document is all there is to its position.

Shape suffixes: N tokens of one document, L the pack's length.
Numpy integers only: no torch, no device, no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_vl.sequence.visual import ImageSpan, PatchGrid, VideoSpan, video_places

UNSUPERVISED = -1
"""Turn id of a token that is not trained on."""

TEXT = -1
"""Visual row of a place that holds a token's own embedding."""


@dataclass(frozen=True)
class Document:
    """One encoded sample.

    tokens_N: int64; image tokens are already expanded.
    turn_ids_N: int32; the number of the assistant turn a token belongs to as a target, or
        UNSUPERVISED.
    visuals: images and videos in the order their units are encoded, starts counted from the
        document's first token. Tokens of a video's span stand in the reserved order.
    """

    tokens_N: NDArray[np.int64]
    turn_ids_N: NDArray[np.int32]
    visuals: tuple[ImageSpan | VideoSpan, ...] = ()

    def __post_init__(self) -> None:
        assert self.tokens_N.ndim == 1
        assert self.tokens_N.shape == self.turn_ids_N.shape

    def __len__(self) -> int:
        return len(self.tokens_N)


@dataclass(frozen=True)
class PlacedVideo:
    """A pruned video in a pack: its span with the pack's places, and its first visual row."""

    span: VideoSpan
    first_row: int


@dataclass(frozen=True)
class IndexMap:
    """The positions of one pack.

    tokens_L: int64; the documents, then padding.
    labels_L: int64; the next token inside the document, 0 where the weight is 0.
    loss_weights_L: float32; 1 / sqrt(n of the turn), 0 where nothing is trained.
    document_ids_L: int32; 0, 1, 2 ...; padding at the end, if any, is the last document.
    cu_seqlens: int32; where each document starts, its padding included, and L at the end.
    document_lengths: tokens of each document without padding; padding at the end counts 0.
    max_document_length: the longest document, padding included.
    visual_rows_L: int64; which visual embedding stands at a place, or TEXT. Embeddings are
        numbered through the pack's visual units before any is pruned.
    grids: patches of each visual unit, in order.
    videos: the pruned videos, whose rows above are the reserved ones.
    weight_total: the denominator of the pack's loss: the sum over turns of sqrt(n).
    num_tokens: tokens without padding.
    """

    tokens_L: NDArray[np.int64]
    labels_L: NDArray[np.int64]
    loss_weights_L: NDArray[np.float32]
    document_ids_L: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    document_lengths: tuple[int, ...]
    max_document_length: int
    visual_rows_L: NDArray[np.int64]
    grids: tuple[PatchGrid, ...]
    videos: tuple[PlacedVideo, ...]
    weight_total: float
    num_tokens: int

    @property
    def cu_seqlens_unpadded(self) -> NDArray[np.int32]:
        """int32; as cu_seqlens, of the documents' own tokens alone."""
        return np.concatenate([[0], np.cumsum(self.document_lengths)]).astype(np.int32)

    @property
    def positions_L(self) -> NDArray[np.int32]:
        """int32; place of each token inside its document (the decoder itself reads none)."""
        starts = np.repeat(self.cu_seqlens[:-1], np.diff(self.cu_seqlens))
        return (np.arange(len(self.tokens_L)) - starts).astype(np.int32)


def document_labels(
    document: Document,
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Labels and loss weights of one document, and the sum over its turns of sqrt(n).

    Position i predicts token i + 1 of the same document; the last position predicts nothing. A turn
    with n predicted tokens gives each the weight 1 / sqrt(n), so that the turn's weights sum to
    sqrt(n): the loss is the mean over turns of their mean losses, weighted by sqrt(n) ("square
    averaging", arXiv 2511.03929; the public Megatron-LM code weighs turns the same way). The count
    is the whole turn's, however ranks later share its tokens.
    """
    length = len(document)
    labels_N = np.zeros(length, dtype=np.int64)
    weights_N = np.zeros(length, dtype=np.float32)
    if length < 2:
        return labels_N, weights_N, 0.0
    turns = document.turn_ids_N[1:]
    supervised = turns != UNSUPERVISED
    if not supervised.any():
        return labels_N, weights_N, 0.0
    labels_N[:-1][supervised] = document.tokens_N[1:][supervised]
    counts = np.bincount(turns[supervised])
    weights_N[:-1][supervised] = 1.0 / np.sqrt(counts[turns[supervised]])
    return labels_N, weights_N, float(np.sqrt(counts[counts > 0]).sum())


def aligned(length: int, alignment: int) -> int:
    """The next multiple of `alignment` at or above `length`. [tokens]"""
    return -(-length // alignment) * alignment


class _Visuals:
    """Where the embeddings of a pack's images and videos go, collected document by document."""

    def __init__(self, length: int) -> None:
        self.rows_L = np.full(length, TEXT, dtype=np.int64)
        self.grids: list[PatchGrid] = []
        self.videos: list[PlacedVideo] = []
        self._row = 0

    def place(self, document: Document, start: int) -> None:
        """Add the visuals of a document that starts at a place of the pack."""
        for visual in document.visuals:
            moved = replace(visual, start=visual.start + start)
            if isinstance(moved, ImageSpan):
                places = moved.start + np.arange(moved.tokens)
                self.rows_L[places] = self._row + np.arange(moved.tokens)
                self.grids += moved.grids
                self._row += moved.tokens
                continue
            self.rows_L[moved.start + video_places(moved)] = self._row + np.arange(moved.kept)
            if moved.pruned:
                _refuse_supervised(document, visual.start, moved.length)
                self.videos.append(PlacedVideo(moved, self._row))
            self.grids += [moved.grid] * moved.num_frames
            self._row += moved.num_frames * moved.grid.tokens


def _refuse_supervised(document: Document, start: int, length: int) -> None:
    turns = document.turn_ids_N[start : start + length]
    if (turns != UNSUPERVISED).any():
        turn = int(turns[turns != UNSUPERVISED][0])
        raise ValueError(
            f"a pruned video stands inside the supervised turn {turn}; only what a user shows may "
            "be pruned: keep all its embeddings, or mark its tokens unsupervised"
        )


def lay_out(
    documents: Sequence[Document], *, length: int, pad_token: int, alignment: int = 1
) -> IndexMap:
    """Place documents one after the other in a row of `length` tokens.

    Args:
        alignment: every document is padded to a multiple of this many tokens; a multiple of twice
            the context-parallel ranks where there are several.

    Raises:
        ValueError: no documents, an empty one, more tokens than `length`, or a pruned video among
            supervised tokens, whose labels would have to move with its frames.
    """
    if not documents:
        raise ValueError("a pack needs at least one document")
    real = [len(document) for document in documents]
    if min(real) == 0:
        raise ValueError(f"document {real.index(0)} of the pack has no tokens")
    lengths = [aligned(count, alignment) for count in real]
    used = sum(lengths)
    if used > length:
        padded = f" ({sum(real)} before padding to {alignment})" if alignment > 1 else ""
        raise ValueError(f"the documents have {used} tokens{padded}; the pack holds {length}")
    if used < length:
        lengths.append(length - used)
        real.append(0)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    tokens_L = np.full(length, pad_token, dtype=np.int64)
    labels_L = np.zeros(length, dtype=np.int64)
    loss_weights_L = np.zeros(length, dtype=np.float32)
    visuals = _Visuals(length)
    weight_total = 0.0
    for document, start in zip(documents, cu_seqlens.tolist(), strict=False):
        place = slice(start, start + len(document))
        tokens_L[place] = document.tokens_N
        labels_L[place], loss_weights_L[place], weight = document_labels(document)
        weight_total += weight
        visuals.place(document, start)
    return IndexMap(
        tokens_L=tokens_L,
        labels_L=labels_L,
        loss_weights_L=loss_weights_L,
        document_ids_L=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        cu_seqlens=cu_seqlens,
        document_lengths=tuple(real),
        max_document_length=max(lengths),
        visual_rows_L=visuals.rows_L,
        grids=tuple(visuals.grids),
        videos=tuple(visuals.videos),
        weight_total=weight_total,
        num_tokens=sum(real),
    )
