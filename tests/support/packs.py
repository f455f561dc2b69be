"""Packs of random documents, and one forward pass of a model over a pack."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.engine.packed import packed_sequence
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.layout import UNSUPERVISED, Document
from megatron_vl.sequence.visual import ImageSpan, PatchGrid

CPU = torch.device("cpu")
IMAGE_START = 3
"""Place of the first embedding in a document that `picture_documents` makes."""


def run_pack(
    model: VisionLanguageModel,
    pack: Pack,
    *,
    with_labels: bool = False,
    device: torch.device = CPU,
) -> Tensor:
    """Logits (L, vocabulary) or token losses (L) of a model that is whole on this rank."""
    output = model(
        pack.tokens_L.to(device).unsqueeze(0),
        visual_input(pack, device),
        packed_sequence(pack.document_ids_L, pack.cu_seqlens, pack.max_document_length, device),
        labels_BL=pack.labels_L.to(device).unsqueeze(0) if with_labels else None,
    )
    return output[0]


def tile_grid_of(config: StageConfig) -> PatchGrid:
    """Patches of one tile."""
    edge = config.data.tile_size // config.model.encoder.patch_size
    return PatchGrid(edge, edge)


def text_document(tokens: Sequence[int], turns: Sequence[int] | None = None) -> Document:
    """A document without pictures; unsupervised where no turns are given."""
    tokens_N = np.array(tokens, dtype=np.int64)
    turn_ids_N = np.full(len(tokens_N), UNSUPERVISED) if turns is None else np.array(turns)
    return Document(tokens_N, turn_ids_N.astype(np.int32))


def picture_documents(
    config: StageConfig, lengths: Sequence[int], tiles: Sequence[int], generator: torch.Generator
) -> tuple[list[Document], list[Tensor]]:
    """Documents of random tokens, one image of so many tiles in each, and the tiles (T, 3, S, S).

    Every token after the first is supervised, as one turn.
    """
    edge, grid = config.data.tile_size, tile_grid_of(config)
    documents, pictures = [], []
    for length, count in zip(lengths, tiles, strict=True):
        tokens = torch.randint(0, config.model.vocab_size, (length,), generator=generator)
        document = text_document(tokens.tolist(), [0] * length)
        if count:
            span = ImageSpan(IMAGE_START, (grid,) * count)
            document = Document(document.tokens_N, document.turn_ids_N, (span,))
            pictures.append(
                torch.randint(
                    0, 256, (count, 3, edge, edge), dtype=torch.uint8, generator=generator
                )
            )
        documents.append(document)
    return documents, pictures


def pack_of_documents(
    config: StageConfig, documents: Sequence[Document], pictures: Sequence[Tensor], length: int = 0
) -> Pack:
    """A pack of them, without padding unless a length is given."""
    return make_pack(
        documents,
        pictures,
        [str(number) for number in range(len(documents))],
        length=length or sum(map(len, documents)),
        patch_size=config.model.encoder.patch_size,
        pad_token=0,
    )
