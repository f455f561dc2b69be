"""How context-parallel ranks share a pack: zig-zag, document by document.

Every document is cut into 2 * C chunks of equal length for C ranks; rank r holds chunks r and
2C - 1 - r, so that causal attention costs every rank the same. The order is that of Transformer
Engine's `thd_get_partitioned_indices`, computed here on the host once per pack. Documents (padding
is one) must be multiples of 2 * C long; `lay_out` pads them.

Costs a few array operations a pack. Numpy integers only: no torch, no process group.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Segment(NamedTuple):
    """Neighbouring queries of one rank that attend to the first `num_keys` tokens of one document.

    Under a causal mask the queries are the last of those keys. No keys at all: padding, whose
    result nobody reads.
    """

    num_queries: int
    document: int
    num_keys: int


def chunks(boundaries: Sequence[int], size: int) -> list[tuple[int, int, int]]:
    """(start, end, chunk length) of every document of a pack.

    Args:
        boundaries: document starts, then the pack's length.
        size: context-parallel ranks.

    Raises:
        ValueError: a document is no multiple of 2 * size.
    """
    cut = []
    for number, (start, end) in enumerate(pairwise(boundaries)):
        length = end - start
        if size > 1 and length % (2 * size):
            raise ValueError(
                f"document {number} of the pack has {length} tokens, {size} context-parallel ranks "
                f"need a multiple of {2 * size}; set data.document_alignment={2 * size}"
            )
        cut.append((start, end, length if size == 1 else length // (2 * size)))
    return cut


def shard(boundaries: Sequence[int], size: int, rank: int) -> NDArray[np.int64]:
    """Places in the pack of the tokens that one rank holds, in the order it holds them."""
    if size == 1:
        return np.arange(boundaries[-1], dtype=np.int64)
    places = []
    for start, end, chunk in chunks(boundaries, size):
        places.append(np.arange(start + rank * chunk, start + (rank + 1) * chunk))
        places.append(np.arange(end - (rank + 1) * chunk, end - rank * chunk))
    return np.concatenate(places).astype(np.int64)


def joined(boundaries: Sequence[int], size: int) -> NDArray[np.int64]:
    """Places in the pack when all ranks' shards stand one after the other."""
    return np.concatenate([shard(boundaries, size, rank) for rank in range(size)])


def unshard(boundaries: Sequence[int], size: int) -> NDArray[np.int64]:
    """Where each token of the pack lies when all ranks' shards stand one after the other.

    `together[unshard(...)]` is in the pack's order again.
    """
    places = joined(boundaries, size)
    inverse = np.empty_like(places)
    inverse[places] = np.arange(len(places))
    return inverse


def causal_segments(
    boundaries: Sequence[int], size: int, rank: int, *, padding: bool
) -> tuple[Segment, ...]:
    """The segments of one rank's shard, in its order.

    Args:
        padding: the last document is padding.
    """
    segments = []
    cut = chunks(boundaries, size)
    for number, (start, end, chunk) in enumerate(cut):
        length = end - start
        if padding and number == len(cut) - 1:
            segments.append(Segment(length // size, number, 0))
        elif size == 1:
            segments.append(Segment(length, number, length))
        else:
            segments.append(Segment(chunk, number, (rank + 1) * chunk))
            segments.append(Segment(chunk, number, length - rank * chunk))
    return tuple(segments)
