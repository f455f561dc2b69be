"""Softmax attention over a pack, one stretch of queries at a time.

What: every segment of queries attends to its own run of keys, the whole run or causally. No mask
over the pack is ever built and no document's result depends on its neighbours.

Why: with context parallelism a segment of queries is shorter than its keys and lies at their lower
right, which PyTorch's causal flag (upper left) does not say. On CUDA in half precision PyTorch's
own lower-right bias runs in its flash kernel; elsewhere the queries go in blocks, each under a
rectangular mask of at most QUERY_BLOCK rows.

Costs one kernel launch a segment (a document, or two pieces of one under context parallelism).

Shapes: T queries, S keys, N heads, G key/value heads (N a multiple of G), D head width, B = 1.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_vl.sequence.shards import Segment

QUERY_BLOCK = 512
"""Queries that share one mask. [tokens]"""


def attend_segments(
    query_TND: Tensor,
    key_SGD: Tensor,
    value_SGD: Tensor,
    boundaries: Sequence[int],
    segments: Sequence[Segment],
    *,
    causal: bool,
    scale: float | None,
) -> Tensor:
    """Attention of consecutive segments of queries.

    Args:
        boundaries: where each document's keys start, then S.
        segments: together all T queries, in order.
        causal: a segment's queries are the last of its keys and see none behind themselves.
        scale: of the scores; 1 / sqrt(D) where None.

    Returns:
        (T, N, D); zeros for segments without keys.
    """
    # Split views, not slices of the pack: autograd joins their gradients in one concatenation.
    queries = _by_heads(query_TND).split([segment.num_queries for segment in segments], dim=2)
    lengths = [end - start for start, end in pairwise(boundaries)]
    keys, values = (_by_heads(tensor).split(lengths, dim=2) for tensor in (key_SGD, value_SGD))
    results = []
    for (_, document, num_keys), query_BNTD in zip(segments, queries, strict=True):
        if num_keys == 0:
            results.append(torch.zeros_like(query_BNTD))
            continue
        key_BGSD = keys[document][:, :, :num_keys]
        value_BGSD = values[document][:, :, :num_keys]
        results.append(attend(query_BNTD, key_BGSD, value_BGSD, causal=causal, scale=scale))
    return torch.cat(results, dim=2).squeeze(0).transpose(0, 1)


def _by_heads(tensor_TND: Tensor) -> Tensor:
    """(T, N, D) as (1, N, T, D)."""
    return tensor_TND.transpose(0, 1).unsqueeze(0)


def attend(
    query_BNTD: Tensor, key_BGSD: Tensor, value_BGSD: Tensor, *, causal: bool, scale: float | None
) -> Tensor:
    """Attention of (B, N, T, D) to (B, G, S, D); causal: the queries are the last T of S places."""
    num_queries, num_keys = query_BNTD.shape[2], key_BGSD.shape[2]
    square = num_queries == num_keys
    causal = causal and num_queries > 1  # the last query sees every key
    if square or not causal:
        return _sdpa(query_BNTD, key_BGSD, value_BGSD, None, is_causal=causal, scale=scale)
    if query_BNTD.is_cuda and query_BNTD.dtype in (torch.bfloat16, torch.float16):
        bias = causal_lower_right(num_queries, num_keys)
        return _sdpa(query_BNTD, key_BGSD, value_BGSD, bias, is_causal=False, scale=scale)
    before = num_keys - num_queries
    blocks = []
    for start in range(0, num_queries, QUERY_BLOCK):
        end = min(start + QUERY_BLOCK, num_queries)
        seen = torch.ones(end - start, before + end, dtype=torch.bool, device=query_BNTD.device)
        blocks.append(
            _sdpa(
                query_BNTD[:, :, start:end],
                key_BGSD[:, :, : before + end],
                value_BGSD[:, :, : before + end],
                seen.tril(before + start),
                is_causal=False,
                scale=scale,
            )
        )
    return torch.cat(blocks, dim=2)


def _sdpa(
    query_BNTD: Tensor,
    key_BGSD: Tensor,
    value_BGSD: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool,
    scale: float | None,
) -> Tensor:
    return F.scaled_dot_product_attention(
        query_BNTD,
        key_BGSD,
        value_BGSD,
        attn_mask=mask,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=query_BNTD.shape[1] != key_BGSD.shape[1],
    )
