"""Efficient video sampling: which embeddings of a video stay, and where its tokens then stand.

An embedding that hardly differs from the one at the same place of the previous frame is dropped
(arXiv 2510.14624). How many stay is fixed when the pack is laid out; which ones is decided here, on
the device, without a word to the host: from the choice follow, by sums over integers, the order of
text and embeddings inside the video's span. Nothing outside the span moves. Every rank computes the
same order from the same embeddings; no gradient flows through the choice.

Costs a sort of the video's scores and a few integer operations a video.

Shapes: F frames, P embeddings of a frame, C width, K embeddings that stay, X text tokens of the
span, N tokens of the span, L pack length, V embeddings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.sequence.layout import TEXT
from megatron_vl.sequence.visual import VideoSpan, video_order

FIRST_FRAME_SCORE = 255.0
"""Above any 1 - cosine, so that the first frame stays whole."""

FRAMES_AT_ONCE = 16
"""Frames that are held in float32 at a time."""


@dataclass(frozen=True)
class PrunedVideo:
    """A pruned video of a pack on the device: its span, its embeddings' rows (F*P), and
    `VideoOrder` as tensors."""

    span: VideoSpan
    rows_V: Tensor
    text_places_X: Tensor
    frames_before_X: Tensor
    embedding_places_K: Tensor
    text_before_F: Tensor


def pruned_video(span: VideoSpan, rows_V: Tensor, device: torch.device) -> PrunedVideo:
    """Move a video's order to the device.

    Args:
        span: with its places in the pack.
        rows_V: int64, which row each of its embeddings is, before any is dropped; on the device.
    """
    order = video_order(span)

    def on_device(name: str) -> Tensor:
        return torch.from_numpy(vars(order)[name]).to(device, non_blocking=True)

    return PrunedVideo(
        span=span,
        rows_V=rows_V,
        text_places_X=on_device("text_places_X"),
        frames_before_X=on_device("frames_before_X"),
        embedding_places_K=on_device("embedding_places_K"),
        text_before_F=on_device("text_before_F"),
    )


@torch.no_grad()
def kept_embeddings(video_FPC: Tensor, kept: int) -> Tensor:
    """Which embeddings of a video stay.

    The score of an embedding is 1 - cosine to the previous frame's at the same place, in float32;
    the highest stay, the earlier of equal ones. The same choice as vLLM's `evs.py`.

    Returns:
        (K,) int64, ascending, counted through the video.
    """
    frames, places, _ = video_FPC.shape
    scores = [torch.full((1, places), FIRST_FRAME_SCORE, device=video_FPC.device)]
    for first in range(1, frames, FRAMES_AT_ONCE):
        end = min(first + FRAMES_AT_ONCE, frames)
        now_FPC, before_FPC = video_FPC[first:end].float(), video_FPC[first - 1 : end - 1].float()
        scores.append(1 - F.cosine_similarity(now_FPC, before_FPC, dim=-1))
    order_V = torch.argsort(torch.cat(scores).flatten(), descending=True, stable=True)
    return order_V[:kept].sort().values


@torch.no_grad()
def place_videos(
    tokens_L: Tensor, rows_L: Tensor, embeddings_VC: Tensor, videos: Sequence[PrunedVideo]
) -> tuple[Tensor, Tensor]:
    """Tokens and visual rows of a pack in their final order.

    Args:
        tokens_L, rows_L: in the reserved order.
        embeddings_VC: all visual embeddings, by row.

    Returns:
        Both (L,), new tensors.
    """
    tokens_L, rows_L = tokens_L.clone(), rows_L.clone()
    for video in videos:
        span = video.span
        place = slice(span.start, span.start + span.length)
        embeddings_FPC = embeddings_VC.index_select(0, video.rows_V).unflatten(
            0, (span.num_frames, -1)
        )
        kept_K = kept_embeddings(embeddings_FPC, span.kept)
        reserved_N, embedding_places_K = _final_order(video, kept_K)
        tokens_L[place] = tokens_L[place].index_select(0, reserved_N)
        rows_N = torch.full_like(reserved_N, TEXT)
        rows_N[embedding_places_K] = video.rows_V.index_select(0, kept_K)
        rows_L[place] = rows_N
    return tokens_L, rows_L


def _final_order(video: PrunedVideo, kept_K: Tensor) -> tuple[Tensor, Tensor]:
    """Of each final place of the span its reserved place (N), and the final places of the kept
    embeddings (K)."""
    span = video.span
    device = kept_K.device
    edges = torch.arange(span.num_frames + 1, device=device) * span.grid.tokens
    # How many kept embeddings the first f frames have, f from 0 to F.
    kept_before = torch.searchsorted(kept_K, edges)
    text_now_X = torch.arange(len(video.text_places_X), device=device) + kept_before.index_select(
        0, video.frames_before_X
    )
    frames_K = kept_K // span.grid.tokens
    embedding_now_K = torch.arange(span.kept, device=device) + video.text_before_F.index_select(
        0, frames_K
    )
    reserved_N = torch.empty(span.length, dtype=torch.int64, device=device)
    reserved_N[text_now_X] = video.text_places_X
    reserved_N[embedding_now_K] = video.embedding_places_K
    return reserved_N, embedding_now_K
