"""Pack layout: explicit index lists, then properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.layout import UNSUPERVISED, Document, lay_out

IMAGE = 99


def document(tokens: list[int], turns: list[int]) -> Document:
    return Document(
        tokens_N=np.array(tokens, dtype=np.int64),
        turn_ids_N=np.array(turns, dtype=np.int32),
        visual_positions_V=np.flatnonzero(np.array(tokens) == IMAGE),
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
    assert pack.visual_positions_V.tolist() == [1, 2, 11]
    assert pack.max_document_length == 7
    assert pack.num_tokens == 13
    assert pack.weight_total == pytest.approx(np.sqrt(3) + 2)
    assert [pack.tokens_L.dtype, pack.loss_weights_L.dtype] == [np.int64, np.float32]
    assert [pack.document_ids_L.dtype, pack.cu_seqlens.dtype] == [np.int32, np.int32]


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


@given(documents, st.integers(0, 9))
def test_properties(rows: list[list[tuple[int, int]]], spare: int) -> None:
    made = [document([token for token, _ in row], [turn for _, turn in row]) for row in rows]
    length = sum(map(len, rows)) + spare
    pack = lay_out(made, length=length, pad_token=0)
    assert (pack.tokens_L[pack.visual_positions_V] == IMAGE).all()
    assert len(pack.visual_positions_V) == (pack.tokens_L == IMAGE).sum()
    supervised = np.flatnonzero(pack.loss_weights_L)
    assert (pack.labels_L[supervised] == pack.tokens_L[supervised + 1]).all()
    ids = pack.document_ids_L
    assert (ids[supervised] == ids[supervised + 1]).all(), "a label crosses documents"
    assert (pack.labels_L[pack.loss_weights_L == 0] == 0).all()
    assert pack.loss_weights_L.sum() == pytest.approx(pack.weight_total, rel=1e-5)
    assert pack.cu_seqlens[0] == 0
    assert pack.cu_seqlens[-1] == length
    assert np.bincount(ids).tolist() == np.diff(pack.cu_seqlens).tolist()
    assert len(pack.cu_seqlens) - 1 == len(rows) + (spare > 0)


def test_a_change_in_one_document_leaves_the_others_alone() -> None:
    same = document([5, 6, 7], [-1, 0, 0])
    one = lay_out([document([1, 2], [-1, 0]), same], length=6, pad_token=0)
    two = lay_out([document([3, IMAGE], [-1, -1]), same], length=6, pad_token=0)
    for field in ("tokens_L", "labels_L", "loss_weights_L", "document_ids_L"):
        assert (getattr(one, field)[2:] == getattr(two, field)[2:]).all()
