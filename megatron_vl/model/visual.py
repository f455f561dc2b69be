"""What the model is shown of one pack: patches, their grids, and where their embeddings go.

Under context parallelism a rank is given its share of the visual units; the rows count the
embeddings as they lie when all ranks' are gathered (see `sequence.units`).

Shape suffixes: P patches, F numbers of a patch, L pack length.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vl.data.pack import Pack
from megatron_vl.model.evs import PrunedVideo, pruned_video
from megatron_vl.sequence.units import share_units
from megatron_vl.sequence.visual import PatchGrid


@dataclass(frozen=True)
class VisualInput:
    """The visual part of a pack, on the device.

    patches_PF: uint8 patches of this context rank's units; blank for a rank without a unit.
    grids: of each of its units; none for a pack without any.
    padded_tokens: embeddings each context rank brings to the gathering.
    rows_L: int64; the gathered embedding at each place of the pack, -1 for text. Reserved places
        for pruned videos.
    videos: pruned videos, whose rows the embeddings decide.
    """

    patches_PF: Tensor
    grids: tuple[PatchGrid, ...]
    padded_tokens: int
    rows_L: Tensor
    videos: tuple[PrunedVideo, ...]


def visual_input(
    pack: Pack, device: torch.device, *, context_size: int = 1, context_rank: int = 0
) -> VisualInput:
    """Move this context rank's visual part of a pack to the device."""

    def on_device(rows: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(rows).to(device, non_blocking=True)

    reserved_L = pack.visual_rows_L.numpy()
    if not pack.grids:
        return VisualInput(pack.patches_PF.to(device), (), 0, on_device(reserved_L), ())
    share = share_units(pack.grids, context_size, context_rank)
    patches_PF = pack.patches_PF[share.first_patch : share.first_patch + share.num_patches]
    if not share.num_patches:
        patches_PF = pack.patches_PF.new_zeros(share.grids[0].patches, pack.patches_PF.shape[1])
    shown_L = reserved_L >= 0
    rows_L = np.where(shown_L, share.gathered_rows_V[reserved_L * shown_L], reserved_L)
    videos = []
    for video in pack.videos:
        first, embeddings = video.first_row, video.span.num_frames * video.span.grid.tokens
        rows_V = on_device(share.gathered_rows_V[first : first + embeddings])
        videos.append(pruned_video(video.span, rows_V, device))
    return VisualInput(
        patches_PF=patches_PF.to(device, non_blocking=True),
        grids=share.grids,
        padded_tokens=share.padded_tokens,
        rows_L=on_device(rows_L),
        videos=tuple(videos),
    )
