"""Where the documents of a pack lie, as every layer reads it: computed once per batch on the host.

megatron-core's `PackedSeqParams` carries what its attention reads. `PackedSequence` adds what the
Mamba layers need (document ids) and the boundaries as plain integers, so that no layer asks the
device for them.
"""

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass
class PackedSequence(PackedSeqParams):
    """Documents of one packed sequence of length L.

    Attributes:
        document_ids_BL: int32 (1, L), ascending from 0; padding is the last document.
        boundaries: document starts, then L: the same numbers as cu_seqlens_q, on the host.
    """

    document_ids_BL: Tensor | None = None
    boundaries: tuple[int, ...] = ()


def packed_sequence(
    document_ids_L: Tensor, cu_seqlens: Tensor, max_document_length: int, device: torch.device
) -> PackedSequence:
    """Describe one pack to the layers.

    Args:
        document_ids_L: int32 (L,) on the host.
        cu_seqlens: int32 (documents + 1,) on the host, from 0 to L.
        max_document_length: longest document, in tokens.
        device: where the layers run.
    """
    cu_seqlens_on_device = cu_seqlens.to(device, non_blocking=True)
    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens_on_device,
        cu_seqlens_kv=cu_seqlens_on_device,
        max_seqlen_q=max_document_length,
        max_seqlen_kv=max_document_length,
        document_ids_BL=document_ids_L.to(device, non_blocking=True).unsqueeze(0),
        boundaries=tuple(cu_seqlens.tolist()),
    )
