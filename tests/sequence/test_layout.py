"""Pack layout: explicit index lists, then properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.layout import UNSUPERVISED, Document, PlacedVideo, lay_out
from megatron_vl.sequence.visual import (
    ImageSpan,
    PatchGrid,
    VideoSpan,
    reserved_counts,
    video_places,
)

IMAGE = 99
ONE = PatchGrid(2, 2)


def document(tokens: list[int], turns: list[int]) -> Document:
    """Every run of IMAGE is one image; each of its units makes one embedding."""
    starts = [
        i for i, token in enumerate(tokens) if token == IMAGE and (i == 0 or tokens[i - 1] != IMAGE)
    ]
    runs = [
        next((j for j in range(i, len(tokens)) if tokens[j] != IMAGE), len(tokens)) - i
        for i in starts
    ]
    return Document(
        tokens_N=np.array(tokens, dtype=np.int64),
        turn_ids_N=np.array(turns, dtype=np.int32),
        visuals=tuple(ImageSpan(i, (ONE,) * n) for i, n in zip(starts, runs, strict=True)),
    )


def test_two_documents_and_padding() -> None:
    first = document([10, IMAGE, IMAGE, 11, 12, 13, 14], [-1, -1, -1, -1, 0, 0, 0])
    second = document([20, 21, 22, 23, IMAGE, 24], [-1, 0, -1, -1, -1, 1])
    pack = lay_out([first, second], length=16, pad_token=0)
    third = 1 / np.sqrt(3)
    assert pack.tokens_L.tolist() == [10, 99, 99, 11, 12, 13, 14, 20, 21, 22, 23, 99, 24, 0, 0, 0]
    assert pack.labels_L.tolist() == [0, 0, 0, 12, 13, 14, 0, 21, 0, 0, 0, 24, 0, 0, 0, 0]
    np.testing.assert_allclose(
        pack.loss_weights_L,
        [0, 0, 0, third, third, third, 0, 1, 0, 0, 0, 1, 0, 0, 0, 0],
        rtol=1e-6,
    )
    assert pack.document_ids_L.tolist() == [0] * 7 + [1] * 6 + [2] * 3
    assert pack.cu_seqlens.tolist() == [0, 7, 13, 16]
    assert pack.document_lengths == (7, 6, 0)
    assert pack.positions_L.tolist() == [*range(7), *range(6), *range(3)]
    assert pack.visual_rows_L.tolist() == [-1, 0, 1] + [-1] * 8 + [2] + [-1] * 4
    assert pack.grids == (ONE, ONE, ONE)
    assert pack.videos == ()
    assert pack.max_document_length == 7
    assert pack.num_tokens == 13
    assert pack.weight_total == pytest.approx(np.sqrt(3) + 2)
    assert [pack.tokens_L.dtype, pack.loss_weights_L.dtype] == [np.int64, np.float32]
    assert [pack.document_ids_L.dtype, pack.cu_seqlens.dtype] == [np.int32, np.int32]


def test_every_document_is_padded_on_its_own() -> None:
    rows = [document([1] * 5, [0] * 5), document([2] * 4, [-1, 0, 0, 0])]
    pack = lay_out(rows, length=16, pad_token=9, alignment=4)
    assert pack.tokens_L.tolist() == [1] * 5 + [9] * 3 + [2] * 4 + [9] * 4
    assert pack.cu_seqlens.tolist() == [0, 8, 12, 16]
    assert pack.cu_seqlens_unpadded.tolist() == [0, 5, 9, 9]
    assert pack.positions_L.tolist() == [*range(8), *range(4), *range(4)]
    assert pack.document_ids_L.tolist() == [0] * 8 + [1] * 4 + [2] * 4


def test_a_full_pack_has_no_padding_document() -> None:
    pack = lay_out([document([1, 2], [-1, 0]), document([3], [0])], length=3, pad_token=0)
    assert pack.cu_seqlens.tolist() == [0, 2, 3]
    assert pack.document_ids_L.tolist() == [0, 0, 1]
    assert pack.labels_L.tolist() == [2, 0, 0]
    assert pack.weight_total == 1.0, "the first token of a document is never predicted"


def test_long_padding_is_the_longest_document() -> None:
    pack = lay_out([document([1, 2], [-1, 0])], length=10, pad_token=7)
    assert pack.max_document_length == 8
    assert pack.tokens_L[2:].tolist() == [7] * 8


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens; the pack holds 3"):
        lay_out([document([1] * 4, [0] * 4)], length=3, pad_token=0)
    with pytest.raises(ValueError, match="at least one"):
        lay_out([], length=3, pad_token=0)
    with pytest.raises(ValueError, match="document 1"):
        lay_out([document([1], [0]), document([], [])], length=3, pad_token=0)


documents = st.lists(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 3, IMAGE]), st.sampled_from([UNSUPERVISED, 0, 1, 5])),
        min_size=1,
        max_size=20,
    ),
    min_size=1,
    max_size=6,
)


@given(documents, st.integers(0, 9), st.sampled_from([1, 4, 8]))
def test_properties(rows: list[list[tuple[int, int]]], spare: int, alignment: int) -> None:
    made = [document([token for token, _ in row], [turn for _, turn in row]) for row in rows]
    padded = [-(-len(row) // alignment) * alignment for row in rows]
    length = sum(padded) + spare
    pack = lay_out(made, length=length, pad_token=0, alignment=alignment)
    shown = np.flatnonzero(pack.tokens_L == IMAGE)
    assert pack.visual_rows_L[shown].tolist() == list(range(len(pack.grids)))
    assert (pack.visual_rows_L >= 0).sum() == len(shown) == len(pack.grids)
    supervised = np.flatnonzero(pack.loss_weights_L)
    assert (pack.labels_L[supervised] == pack.tokens_L[supervised + 1]).all()
    ids = pack.document_ids_L
    assert (ids[supervised] == ids[supervised + 1]).all(), "a label crosses documents"
    assert (pack.labels_L[pack.loss_weights_L == 0] == 0).all()
    assert pack.loss_weights_L.sum() == pytest.approx(pack.weight_total, rel=1e-5)
    assert np.diff(pack.cu_seqlens).tolist() == padded + [spare] * (spare > 0)
    assert pack.cu_seqlens[0] == 0
    assert pack.document_lengths == (*map(len, rows), *[0] * (spare > 0))
    assert np.bincount(ids).tolist() == np.diff(pack.cu_seqlens).tolist()
    assert pack.num_tokens == sum(map(len, rows))
    alone = [lay_out([one], length=len(one), pad_token=0) for one in made]
    assert pack.weight_total == pytest.approx(sum(one.weight_total for one in alone), rel=1e-12)
    for start, one in zip(pack.cu_seqlens.tolist(), alone, strict=False):
        place = slice(start, start + len(one.tokens_L))
        for field in ("tokens_L", "labels_L", "loss_weights_L"):
            assert (getattr(pack, field)[place] == getattr(one, field)).all()


def test_a_change_in_one_document_leaves_the_others_alone() -> None:
    same = document([5, 6, 7], [-1, 0, 0])
    one = lay_out([document([1, 2], [-1, 0]), same], length=6, pad_token=0)
    two = lay_out([document([3, IMAGE], [-1, -1]), same], length=6, pad_token=0)
    for field in ("tokens_L", "labels_L", "loss_weights_L", "document_ids_L"):
        assert (getattr(one, field)[2:] == getattr(two, field)[2:]).all()


def test_documents_are_padded_to_the_alignment() -> None:
    pack = lay_out(
        [document([1, 2, 3], [-1, 0, 0]), document([4, 5, 6, 7], [0] * 4)],
        length=12,
        pad_token=9,
        alignment=4,
    )
    assert pack.tokens_L.tolist() == [1, 2, 3, 9, 4, 5, 6, 7, 9, 9, 9, 9]
    assert pack.labels_L.tolist() == [2, 3, 0, 0, 5, 6, 7, 0, 0, 0, 0, 0]
    assert pack.cu_seqlens.tolist() == [0, 4, 8, 12]
    assert pack.document_lengths == (3, 4, 0)
    with pytest.raises(ValueError, match=r"have 8 tokens \(7 before padding to 4\); .* holds 7"):
        lay_out(
            [document([1] * 3, [0] * 3), document([1] * 4, [0] * 4)],
            length=7,
            pad_token=0,
            alignment=4,
        )


# Three frames of 2 x 4 patches (2 embeddings each); 8 is a label, 7 a tag, 6 stands between frames.
FRAME = PatchGrid(2, 4)
VIDEO = [8, 8, 7, IMAGE, IMAGE, 7, 6, 8, 7, IMAGE, IMAGE, 7, 6, 8, 7, IMAGE, 7]
SPAN = VideoSpan(start=1, grid=FRAME, before_F=(3, 2, 2), after_F=(2, 2, 1), kept=5)


def video_document(span: VideoSpan = SPAN, turn: int = UNSUPERVISED) -> Document:
    tokens = [5, *VIDEO, 4, 3]
    return Document(
        tokens_N=np.array(tokens, dtype=np.int64),
        turn_ids_N=np.array([turn] * (len(tokens) - 1) + [0], dtype=np.int32),
        visuals=(span,),
    )


def test_a_video_holds_reserved_places() -> None:
    """The first frames in full: 2, 2 and 1 of 5; rows count the pruned embeddings too."""
    assert SPAN.length == len(VIDEO)
    assert reserved_counts(3, 2, 5) == [2, 2, 1]
    assert reserved_counts(3, 2, 2) == [2, 0, 0]
    assert video_places(SPAN).tolist() == [3, 4, 9, 10, 15]
    picture = document([1, IMAGE, 2], [-1, -1, 0])
    pack = lay_out([picture, video_document(), picture], length=26, pad_token=0)
    rows = pack.visual_rows_L
    shown = np.flatnonzero(rows >= 0)
    assert shown.tolist() == [1, 7, 8, 13, 14, 19, 24]
    assert rows[shown].tolist() == [0, 1, 2, 3, 4, 5, 7]
    assert (pack.tokens_L[shown] == IMAGE).all()
    assert pack.grids == (ONE, FRAME, FRAME, FRAME, ONE)
    (video,) = pack.videos
    assert video == PlacedVideo(VideoSpan(4, FRAME, (3, 2, 2), (2, 2, 1), 5), first_row=1)


def test_a_whole_video_is_no_video_to_prune() -> None:
    whole = VideoSpan(start=1, grid=ONE, before_F=(3, 2), after_F=(2, 1), kept=2)
    made = Document(np.arange(12), np.zeros(12, dtype=np.int32), (whole,))
    pack = lay_out([made], length=12, pad_token=0)
    assert pack.videos == ()
    assert np.flatnonzero(pack.visual_rows_L >= 0).tolist() == [4, 9]


def test_a_pruned_video_is_not_supervised() -> None:
    with pytest.raises(ValueError, match="supervised turn 4"):
        lay_out([video_document(turn=4)], length=20, pad_token=0)
