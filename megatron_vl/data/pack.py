"""One micro-batch: a row of samples, ready for the model.

Shape suffixes: L pack length, T tiles, C channels (3), H and W tile edges, V visual embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_vl.sequence.layout import Document, lay_out


@dataclass(frozen=True)
class Pack:
    """One micro-batch of packed samples, as CPU tensors. L is data.sequence_length always."""

    tokens_L: Tensor
    """int64; visual positions hold the `<image>` id."""
    labels_L: Tensor
    """int64; the next token inside the document, 0 where the loss weight is 0."""
    loss_weights_L: Tensor
    """float32; 1 / sqrt(n of its assistant turn), 0 where nothing is trained."""
    document_ids_L: Tensor
    """int32; ascending from 0; padding is the last document."""
    cu_seqlens: Tensor
    """int32; where each document starts, and L at the end."""
    max_document_length: int
    """Tokens of the longest document, padding included."""
    tiles_TCHW: Tensor
    """uint8; the tiles of all images in order; T may be 0."""
    visual_positions_V: Tensor
    """int64; pack position of each visual embedding, in tile order; V = T * tokens per tile."""
    weight_total: float
    """Sum over assistant turns of sqrt(n): this pack's part of the loss denominator."""
    num_tokens: int
    """Tokens without padding."""
    sample_keys: tuple[str, ...]
    """Keys of the samples, in order."""


def make_pack(
    documents: Sequence[Document],
    tiles: Sequence[Tensor],
    keys: Sequence[str],
    *,
    length: int,
    tile_size: int,
    pad_token: int,
) -> Pack:
    """A pack of encoded samples and their tiles, each (T, 3, S, S).

    Raises:
        ValueError: the documents do not fit; see `lay_out`.
    """
    layout = lay_out(documents, length=length, pad_token=pad_token)
    # Joined by NumPy, which does not wake torch's threads under the trainer's feet.
    empty = np.empty((0, 3, tile_size, tile_size), dtype=np.uint8)
    tiles_TCHW = np.concatenate([empty, *(image.numpy() for image in tiles)])
    return Pack(
        tokens_L=torch.from_numpy(layout.tokens_L),
        labels_L=torch.from_numpy(layout.labels_L),
        loss_weights_L=torch.from_numpy(layout.loss_weights_L),
        document_ids_L=torch.from_numpy(layout.document_ids_L),
        cu_seqlens=torch.from_numpy(layout.cu_seqlens),
        max_document_length=layout.max_document_length,
        tiles_TCHW=torch.from_numpy(tiles_TCHW),
        visual_positions_V=torch.from_numpy(layout.visual_positions_V),
        weight_total=layout.weight_total,
        num_tokens=layout.num_tokens,
        sample_keys=tuple(keys),
    )
