"""One micro-batch: a row of samples, ready for the model.

Shape suffixes: L pack length, P patches, F numbers of a patch (3 * edge * edge), T tiles, C
channels (3), H and W tile edges.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vl.sequence.layout import Document, PlacedVideo, lay_out
from megatron_vl.sequence.visual import PatchGrid, VideoSpan

MODALITIES = ("text", "image", "video")
"""What a sample may show; one with images and videos counts as video."""


@dataclass(frozen=True)
class Pack:
    """One micro-batch of packed samples, as CPU tensors: see `IndexMap` for the meaning of each.

    L is data.sequence_length always. patches_PF is uint8, the patches of all visual units (tiles,
    frames, images) in order, each flattened as (channel, row, column); P may be 0.
    """

    tokens_L: Tensor
    labels_L: Tensor
    loss_weights_L: Tensor
    document_ids_L: Tensor
    cu_seqlens: Tensor
    document_lengths: tuple[int, ...]
    max_document_length: int
    patches_PF: Tensor
    grids: tuple[PatchGrid, ...]
    visual_rows_L: Tensor
    videos: tuple[PlacedVideo, ...]
    weight_total: float
    num_tokens: int
    sample_keys: tuple[str, ...]
    """Keys of the samples, in order."""
    sample_sources: tuple[str, ...] = ()
    """Sources of the samples; empty where they were made up."""
    modalities: tuple[str, ...] = ()
    """What each sample shows, of MODALITIES."""


def patches_of(tiles_TCHW: NDArray[np.uint8], patch_size: int) -> NDArray[np.uint8]:
    """Patches (P, F) of equally large tiles, tile by tile, row-major inside a tile.

    Copied by NumPy, which does not wake torch's threads under the trainer's feet.

    Raises:
        ValueError: a tile is no whole number of patches.
    """
    tiles, channels, height, width = tiles_TCHW.shape
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"tiles of {height}x{width} pixels do not split into patches of "
            f"{patch_size}x{patch_size}; the nearest edge is "
            f"{max(round(height / patch_size), 1) * patch_size}"
        )
    grid = tiles_TCHW.reshape(
        tiles, channels, height // patch_size, patch_size, width // patch_size, patch_size
    )
    return np.ascontiguousarray(grid.transpose(0, 2, 4, 1, 3, 5)).reshape(
        -1, channels * patch_size**2
    )


def make_pack(
    documents: Sequence[Document],
    tiles: Sequence[Tensor],
    keys: Sequence[str],
    *,
    length: int,
    patch_size: int,
    pad_token: int,
    alignment: int = 1,
    sources: Sequence[str] = (),
) -> Pack:
    """A pack of encoded samples and their pictures.

    Args:
        documents: the samples.
        tiles: uint8 (T, 3, H, W) stacks in the order of the documents' visual units; stacks may
            differ in H and W.
        alignment: see `lay_out`.
        sources: of the samples, where they have any.

    Raises:
        ValueError: the documents do not fit, or the pictures are not those the documents describe.
    """
    index_map = lay_out(documents, length=length, pad_token=pad_token, alignment=alignment)
    empty = np.empty((0, 3 * patch_size**2), dtype=np.uint8)
    patches_PF = np.concatenate([empty, *(patches_of(t.numpy(), patch_size) for t in tiles)])
    described = sum(grid.patches for grid in index_map.grids)
    if len(patches_PF) != described:
        raise ValueError(
            f"the documents describe {described} patches, their pictures have {len(patches_PF)}"
        )
    return Pack(
        tokens_L=torch.from_numpy(index_map.tokens_L),
        labels_L=torch.from_numpy(index_map.labels_L),
        loss_weights_L=torch.from_numpy(index_map.loss_weights_L),
        document_ids_L=torch.from_numpy(index_map.document_ids_L),
        cu_seqlens=torch.from_numpy(index_map.cu_seqlens),
        document_lengths=index_map.document_lengths,
        max_document_length=index_map.max_document_length,
        patches_PF=torch.from_numpy(patches_PF),
        grids=index_map.grids,
        visual_rows_L=torch.from_numpy(index_map.visual_rows_L),
        videos=index_map.videos,
        weight_total=index_map.weight_total,
        num_tokens=index_map.num_tokens,
        sample_keys=tuple(keys),
        sample_sources=tuple(sources),
        modalities=tuple(modality_of(document) for document in documents),
    )


def modality_of(document: Document) -> str:
    """The entry of MODALITIES that a document counts as."""
    if any(isinstance(visual, VideoSpan) for visual in document.visuals):
        return "video"
    return "image" if document.visuals else "text"
