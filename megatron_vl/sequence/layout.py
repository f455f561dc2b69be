"""Everything of a pack that has a position, computed once.

A pack is a row of L tokens made of whole documents (encoded samples), one after the other, with
padding at the end as a document of its own. `lay_out` turns the documents into labels, loss
weights, document ids, boundaries and the positions of visual embeddings; every consumer (embedding,
attention, state-space scan, loss, shards) reads these arrays and none recomputes them.

Shape suffixes: N tokens of one document, V visual positions, L the pack's length.
Numpy integers only: no torch, no device, no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

UNSUPERVISED = -1
"""Turn id of a token that is not trained on."""


@dataclass(frozen=True)
class Document:
    """One encoded sample.

    tokens_N: int64; image tokens are already expanded.
    turn_ids_N: int32; the number of the assistant turn a token belongs to as a target, or
    UNSUPERVISED. visual_positions_V: int64, ascending; where the tokens stand that visual
    embeddings replace,
        in the order of the sample's tiles.
    """

    tokens_N: NDArray[np.int64]
    turn_ids_N: NDArray[np.int32]
    visual_positions_V: NDArray[np.int64]

    def __post_init__(self) -> None:
        assert self.tokens_N.ndim == 1
        assert self.tokens_N.shape == self.turn_ids_N.shape

    def __len__(self) -> int:
        return len(self.tokens_N)


@dataclass(frozen=True)
class PackLayout:
    """The positions of one pack. See `lay_out` for the meaning of each array."""

    tokens_L: NDArray[np.int64]
    labels_L: NDArray[np.int64]
    loss_weights_L: NDArray[np.float32]
    document_ids_L: NDArray[np.int32]
    cu_seqlens: NDArray[np.int32]
    max_document_length: int
    visual_positions_V: NDArray[np.int64]
    weight_total: float
    num_tokens: int


def document_labels(
    document: Document,
) -> tuple[NDArray[np.int64], NDArray[np.float32], float]:
    """Labels and loss weights of one document, and the sum over its turns of sqrt(n).

    Position i predicts token i + 1 of the same document; the last position predicts nothing. A turn
    with n predicted tokens gives each the weight 1 / sqrt(n), so that the turn's weights sum to
    sqrt(n): the loss is the mean over turns of their mean losses, weighted by sqrt(n) ("square
    averaging", arXiv 2511.03929; the public Megatron-LM code weighs turns the same way).
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


def lay_out(documents: Sequence[Document], *, length: int, pad_token: int) -> PackLayout:
    """Place documents one after the other in a row of `length` tokens.

    Returns arrays where
        tokens_L holds the documents, then pad_token;
        labels_L holds the next token inside the document, 0 where the weight is 0;
        loss_weights_L holds 1 / sqrt(n of the turn), 0 where nothing is trained;
        document_ids_L counts 0, 1, 2 ...; padding, if any, is the last document;
        cu_seqlens holds where each document starts, and `length` at the end;
        max_document_length is the longest document, padding included;
        visual_positions_V holds the pack position of every visual embedding, in tile order;
        weight_total is the denominator of the pack's loss: the sum over turns of sqrt(n);
        num_tokens counts tokens without padding.

    Raises:
        ValueError: no documents, an empty one, or more tokens than `length`.
    """
    if not documents:
        raise ValueError("a pack needs at least one document")
    lengths = [len(document) for document in documents]
    if min(lengths) == 0:
        raise ValueError(f"document {lengths.index(0)} of the pack has no tokens")
    num_tokens = sum(lengths)
    if num_tokens > length:
        raise ValueError(f"the documents have {num_tokens} tokens; the pack holds {length}")
    if num_tokens < length:
        lengths.append(length - num_tokens)
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)

    tokens_L = np.full(length, pad_token, dtype=np.int64)
    labels_L = np.zeros(length, dtype=np.int64)
    loss_weights_L = np.zeros(length, dtype=np.float32)
    visual = []
    weight_total = 0.0
    for document, start in zip(documents, cu_seqlens.tolist(), strict=False):
        span = slice(start, start + len(document))
        tokens_L[span] = document.tokens_N
        labels_L[span], loss_weights_L[span], weight = document_labels(document)
        visual.append(document.visual_positions_V.astype(np.int64) + start)
        weight_total += weight
    return PackLayout(
        tokens_L=tokens_L,
        labels_L=labels_L,
        loss_weights_L=loss_weights_L,
        document_ids_L=np.repeat(np.arange(len(lengths), dtype=np.int32), lengths),
        cu_seqlens=cu_seqlens,
        max_document_length=max(lengths),
        visual_positions_V=np.concatenate(visual),
        weight_total=weight_total,
        num_tokens=num_tokens,
    )
