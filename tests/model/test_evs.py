"""Efficient video sampling: which embeddings stay, and where the span's tokens then stand."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.model.evs import kept_embeddings, place_videos, pruned_video
from megatron_vl.model.visual import visual_input
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.sequence.counts import evs_kept
from megatron_vl.sequence.layout import TEXT, Document, lay_out
from megatron_vl.sequence.visual import PatchGrid, VideoSpan
from tests.support.packs import CPU, pack_of_documents, run_pack


def test_the_published_example() -> None:
    """P = 4, T = 4, q = .625 keeps 6: patch 2 flips at frame 1, patch 0 changes at frame 3."""
    generator = torch.Generator().manual_seed(3)
    frame = torch.randn(4, 8, generator=generator)
    video = frame.repeat(4, 1, 1)
    video[1:, 2] *= -1
    video[3:, 0] = torch.randn(8, generator=generator)
    kept = evs_kept(4, 4, 0.625)
    assert kept == 6
    assert kept_embeddings(video, kept).tolist() == [0, 1, 2, 3, 4 + 2, 12 + 0]


def test_the_first_frame_stays_whole_and_equal_scores_keep_the_earlier() -> None:
    video = torch.eye(2).repeat(5, 1, 1, 1)[:, 0]
    assert kept_embeddings(video, 2).tolist() == [0, 1]
    orthogonal = torch.stack([torch.eye(2), torch.eye(2).flip(0), torch.eye(2)])
    assert kept_embeddings(orthogonal, 4).tolist() == [0, 1, 2, 3]


def keep_mask(video_FPC: np.ndarray, kept: int) -> list[int]:
    """The rule written out in float64, a pair of embeddings at a time."""
    scores = []
    for frame, embeddings in enumerate(video_FPC):
        for place, now in enumerate(embeddings):
            if frame == 0:
                scores.append(255.0)
                continue
            before = video_FPC[frame - 1][place]
            cosine = (now @ before) / np.sqrt((now @ now) * (before @ before))
            scores.append(1 - float(cosine))
    ranked = sorted(range(len(scores)), key=lambda i: -scores[i])
    return sorted(ranked[:kept])


@pytest.mark.parametrize("seed", range(4))
def test_the_choice_is_the_rule_written_out(seed: int) -> None:
    video = np.random.default_rng(seed).normal(size=(7, 6, 16)) + 1.0
    for kept in (6, 7, 20, 41, 42):
        ours = kept_embeddings(torch.from_numpy(video).float(), kept)
        assert ours.tolist() == keep_mask(video, kept)
        assert ours.dtype == torch.int64


def test_half_precision_is_scored_in_float32() -> None:
    video = torch.randn(3, 50, 64, generator=torch.Generator().manual_seed(5)).bfloat16() + 4
    assert kept_embeddings(video, 90).tolist() == kept_embeddings(video.float(), 90).tolist()


spans = st.integers(1, 5).flatmap(
    lambda frames: st.tuples(
        st.lists(st.integers(0, 3), min_size=frames, max_size=frames),
        st.lists(st.integers(0, 3), min_size=frames, max_size=frames),
        st.sampled_from([PatchGrid(2, 2), PatchGrid(4, 2), PatchGrid(3, 3)]),
        st.floats(0, 1),
        st.integers(0, 1000),
    )
)


@given(spans)
@settings(deadline=None, max_examples=60)
def test_the_final_order_is_frame_by_frame(
    span: tuple[list[int], list[int], PatchGrid, float, int],
) -> None:
    """Against a list built frame by frame from the choice: label, kept embeddings, end tag."""
    before, after, grid, part, seed = span
    frames = len(before)
    least, most = grid.tokens, frames * grid.tokens
    kept = least + int(part * (most - least))
    start, image = 2, 999
    video = VideoSpan(start, grid, tuple(before), tuple(after), kept)
    texts = iter(range(100, 100 + sum(before) + sum(after)))
    labels = [
        ([next(texts) for _ in range(b)], [next(texts) for _ in range(a)])
        for b, a in zip(before, after, strict=True)
    ]
    reserved = [min(grid.tokens, max(0, kept - f * grid.tokens)) for f in range(frames)]
    tokens = [7, 8]
    for (label, tag), count in zip(labels, reserved, strict=True):
        tokens += [*label, *[image] * count, *tag]
    tokens += [9, 9]
    document = Document(np.array(tokens), np.full(len(tokens), -1, dtype=np.int32), (video,))
    index_map = lay_out([document], length=len(tokens) + 3, pad_token=0)

    first = 5
    embeddings = torch.randn(first + most, 4, generator=torch.Generator().manual_seed(seed))
    rows_V = first + torch.arange(most)
    placed = [pruned_video(video, rows_V, CPU)]
    now, rows = place_videos(
        torch.from_numpy(index_map.tokens_L),
        torch.from_numpy(index_map.visual_rows_L),
        embeddings,
        placed,
    )
    chosen = kept_embeddings(embeddings[first:].view(frames, grid.tokens, 4), kept).tolist()
    expected, shown = [7, 8], [TEXT, TEXT]
    for frame, (label, tag) in enumerate(labels):
        stays = [c for c in chosen if c // grid.tokens == frame]
        expected += [*label, *[image] * len(stays), *tag]
        shown += [*[TEXT] * len(label), *[first + c for c in stays], *[TEXT] * len(tag)]
    assert now.tolist() == [*expected, 9, 9, 0, 0, 0]
    assert rows.tolist() == [*shown, *[TEXT] * 5]


FRAMES = 4


def video_pack(config: StageConfig, kept: int, still: bool = True) -> Pack:
    """A document with a video whose second and fourth frame repeat the one before."""
    generator = torch.Generator().manual_seed(71)
    edge = config.data.tile_size
    frames = torch.randint(0, 256, (FRAMES, 3, edge, edge), dtype=torch.uint8, generator=generator)
    if still:
        frames[1], frames[3] = frames[0], frames[2]
    grid = PatchGrid(*[edge // config.model.encoder.patch_size] * 2)
    video = VideoSpan(3, grid, (3,) * FRAMES, (1,) * FRAMES, kept)
    length = 3 + video.length + 9
    tokens = torch.randint(0, config.model.vocab_size, (length,), generator=generator)
    turns = np.where(np.arange(length) < length - 9, -1, 0).astype(np.int32)
    return pack_of_documents(config, [Document(tokens.numpy(), turns, (video,))], [frames])


def test_a_frame_that_keeps_nothing_keeps_its_text(
    model: VisionLanguageModel, config: StageConfig
) -> None:
    """Frames 1 and 3 repeat; a pack put in the final order by hand gives the same logits."""
    pack = video_pack(config, kept=32)
    with torch.no_grad():
        pruned = run_pack(model, pack)
        embeddings = model.encode(pack.patches_PF, pack.grids).squeeze(1)
        chosen = kept_embeddings(embeddings.view(FRAMES, 16, -1), 32)
    assert chosen.tolist() == [*range(16), *range(32, 48)]
    # By hand: label, frame 0, tag, label, tag, label, frame 2, tag, label, tag.
    # Reserved: label, frame 0, tag, label, frame 1, tag, label, tag, label, tag.
    reserved = pack.tokens_L.tolist()
    embedded = reserved[3 + 3 + 16 + 1 + 3 : 3 + 3 + 16 + 1 + 3 + 16]
    text = reserved[3 + 3 + 16 + 1 : 3 + 3 + 16 + 1 + 3], reserved[42:43], reserved[43:46]
    by_hand = [*reserved[:23], *text[0], *text[1], *text[2], *embedded, *reserved[46:]]
    rows = [TEXT] * 6 + list(range(16)) + [TEXT] * 8 + list(range(32, 48))
    rows += [TEXT] * (len(by_hand) - len(rows))
    plain = replace(
        pack, videos=(), tokens_L=torch.tensor(by_hand), visual_rows_L=torch.tensor(rows)
    )
    with torch.no_grad():
        assert torch.equal(run_pack(model, plain), pruned)


def test_no_gradient_flows_through_the_choice(
    model: VisionLanguageModel, config: StageConfig
) -> None:
    """Dropped embeddings get none; kept ones get theirs."""
    pack = video_pack(config, kept=40, still=False)
    given: list[Tensor] = []

    def hold(module: object, args: object, output: Tensor) -> Tensor:
        given.append(output.detach().requires_grad_())
        return given[-1]

    handle = model.vision_projection.register_forward_hook(hold)
    try:
        run_pack(model, pack).square().mean().backward()
    finally:
        handle.remove()
        model.zero_grad()
    embeddings = given[0]
    chosen = kept_embeddings(embeddings.detach().view(FRAMES, 16, -1), 40)
    assert (embeddings.grad.flatten(1).norm(dim=1) > 0).nonzero().flatten().tolist() == (
        chosen.tolist()
    )


def test_the_rows_of_a_pack_are_host_integers_until_the_choice(config: StageConfig) -> None:
    """`visual_input` needs nothing but the pack."""
    pack = video_pack(config, kept=20)
    shown = visual_input(pack, CPU)
    assert int((shown.rows_L >= 0).sum()) == 20
    assert [video.span.kept for video in shown.videos] == [20]
