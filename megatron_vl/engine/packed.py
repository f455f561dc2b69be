"""Where the documents of a pack lie, as every layer reads it: computed once per batch on the host.

megatron-core's `PackedSeqParams` carries what Transformer Engine's attention reads.
`PackedSequence` adds what the Mamba layers need (document ids), what the torch attention needs (its
segments as plain integers) and how context-parallel ranks' shards form the pack, so that no layer
asks the device for anything.

Shapes: L the pack's length, S this context rank's part of it (L without context parallelism).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray
from torch import Tensor

from megatron_vl.sequence.shards import Segment, causal_segments, joined, shard, unshard


@dataclass
class PackedSequence(PackedSeqParams):
    """Documents of one packed sequence of length L.

    Documents are described with their padding: it stands behind the tokens of each, which a causal
    layer does not notice.

    Attributes:
        document_ids_BL: int32 (1, L), ascending from 0; padding at the end is the last document.
        boundaries: document starts, then L: the same numbers as cu_seqlens_q, on the host.
        segments: queries of this rank and the keys they see.
        shard_S: int64 places in the pack of this rank's tokens; None if it holds all, in order.
        joined_L: int64 places in the pack of all ranks' tokens, rank after rank; None likewise.
        unshard_L: int64 the inverse of joined_L; None likewise.
    """

    document_ids_BL: Tensor | None = None
    boundaries: tuple[int, ...] = ()
    segments: tuple[Segment, ...] = ()
    shard_S: Tensor | None = None
    joined_L: Tensor | None = None
    unshard_L: Tensor | None = None

    def local(self, tensor_L: Tensor) -> Tensor:
        """This rank's part of a tensor over the pack (first axis), on the tensor's device."""
        if self.shard_S is None:
            return tensor_L
        return tensor_L.index_select(0, self.shard_S)


def packed_sequence(
    document_ids_L: Tensor,
    cu_seqlens: Tensor,
    max_document_length: int,
    device: torch.device,
    *,
    padding: bool = False,
    context_size: int = 1,
    context_rank: int = 0,
) -> PackedSequence:
    """Describe one pack to the layers.

    Args:
        document_ids_L: int32 (L,) on the host.
        cu_seqlens: int32 (documents + 1,) on the host, from 0 to L.
        max_document_length: longest document, in tokens.
        device: where the layers run.
        padding: the last document is padding.
        context_size, context_rank: of the context-parallel group.

    Raises:
        ValueError: a document is no multiple of 2 * context_size.
    """
    boundaries = tuple(cu_seqlens.tolist())
    cu_seqlens_on_device = cu_seqlens.to(device, non_blocking=True)

    def on_device(places: NDArray[np.int64]) -> Tensor | None:
        if context_size == 1:
            return None
        return torch.from_numpy(places).to(device, non_blocking=True)

    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens_on_device,
        cu_seqlens_kv=cu_seqlens_on_device,
        # Equal to the ones above: then every backend of Transformer Engine takes the pack.
        cu_seqlens_q_padded=cu_seqlens_on_device,
        cu_seqlens_kv_padded=cu_seqlens_on_device,
        max_seqlen_q=max_document_length,
        max_seqlen_kv=max_document_length,
        document_ids_BL=document_ids_L.to(device, non_blocking=True).unsqueeze(0),
        boundaries=boundaries,
        segments=causal_segments(boundaries, context_size, context_rank, padding=padding),
        shard_S=on_device(shard(boundaries, context_size, context_rank)),
        joined_L=on_device(joined(boundaries, context_size)),
        unshard_L=on_device(unshard(boundaries, context_size)),
    )


def packed_units(lengths: Sequence[int], device: torch.device) -> PackedSequence:
    """Describe a row of visual units, each of which attends within itself."""
    ends = np.cumsum([0, *lengths]).astype(np.int32)
    ids = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
    return packed_sequence(torch.from_numpy(ids), torch.from_numpy(ends), max(lengths), device)
