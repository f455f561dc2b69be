"""Tensors between the layout megatron-core stores and the one that is published.

Every function moves rows and rounds nothing, so that a round trip is bitwise. Two of them also
make rows that the other side does not have (`grow_vocabulary`, `prepend_prefix`); how those are
drawn is said there and nowhere else.

Shapes: G key/value groups, N heads, D head width, R rows, E width. Trailing dimensions pass
through, so weights and biases share the functions.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def split_grouped_qkv(fused: Tensor, heads: int, groups: int, width: int) -> list[Tensor]:
    """Query, key and value of a fused projection stored group by group.

    Args:
        fused: (G * (N/G + 2) * D, ...): of each group its queries, then its key, then its value.

    Returns:
        (N*D, ...), (G*D, ...), (G*D, ...).
    """
    queries = heads // groups
    grouped = fused.unflatten(0, (groups, queries + 2, width))
    parts = grouped.split([queries, 1, 1], dim=1)
    return [part.flatten(0, 2) for part in parts]


def join_grouped_qkv(parts: Sequence[Tensor], heads: int, groups: int, width: int) -> Tensor:
    """The inverse of `split_grouped_qkv`."""
    queries = heads // groups
    query, key, value = (
        part.unflatten(0, (groups, count, width))
        for part, count in zip(parts, (queries, 1, 1), strict=True)
    )
    return torch.cat([query, key, value], dim=1).flatten(0, 2)


def heads_outside(fused: Tensor, heads: int) -> Tensor:
    """[Q; K; V] with all heads in each, from rows stored head by head as q, k, v: (3*N*D, ...)."""
    return fused.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)


def heads_inside(fused: Tensor, heads: int) -> Tensor:
    """The inverse of `heads_outside`."""
    return fused.unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)


def grow_vocabulary(table_RE: Tensor, rows: int, std: float, generator: torch.Generator) -> Tensor:
    """A table with `rows` rows: the given ones, then new ones for added tokens and padding.

    Each new row is the mean of the given rows plus normal noise of `std`: a token nobody has seen
    starts with an average logit, and two new tokens differ.
    """
    missing = rows - table_RE.shape[0]
    if missing == 0:
        return table_RE
    grown_RE = torch.empty(rows, *table_RE.shape[1:], dtype=table_RE.dtype)
    grown_RE[:-missing] = table_RE
    noise = torch.empty(missing, *table_RE.shape[1:]).normal_(0.0, std, generator=generator)
    grown_RE[-missing:] = noise + _mean_row(table_RE)
    return grown_RE


def _mean_row(table_RE: Tensor) -> Tensor:
    """The mean row in float32, block by block: a whole table in float32 would double the memory."""
    total = torch.zeros(table_RE.shape[1:], dtype=torch.float64)
    for block in table_RE.split(8192):
        total += block.double().sum(0)
    return (total / table_RE.shape[0]).float()


def prepend_prefix(tokens_RE: Tensor, rows: int, std: float, generator: torch.Generator) -> Tensor:
    """Prefix tokens padded to `rows`: new ones in front, normal with `std`.

    In front, as in Megatron-LM's hook for FP8, which wants a tile's sequence length to be a
    multiple of 16.
    """
    missing = rows - tokens_RE.shape[0]
    fresh = torch.empty(missing, *tokens_RE.shape[1:]).normal_(0.0, std, generator=generator)
    return torch.cat([fresh.to(tokens_RE.dtype), tokens_RE])
