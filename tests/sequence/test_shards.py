"""Zig-zag shards: explicit lists, Transformer Engine's rule written out, properties."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.shards import Segment, causal_segments, joined, shard, unshard


def test_two_documents_on_two_ranks() -> None:
    boundaries = (0, 8, 12)
    assert shard(boundaries, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert shard(boundaries, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert joined(boundaries, 2).tolist() == [0, 1, 6, 7, 8, 11, 2, 3, 4, 5, 9, 10]
    assert unshard(boundaries, 2).tolist() == [0, 1, 6, 7, 8, 9, 2, 3, 4, 10, 11, 5]


def test_one_document_on_three_ranks() -> None:
    """The order megatron-core's comments call 162534."""
    assert [shard((0, 6), 3, rank).tolist() for rank in range(3)] == [[0, 5], [1, 4], [2, 3]]


def test_one_rank_holds_everything_in_order() -> None:
    assert shard((0, 3, 7), 1, 0).tolist() == list(range(7))
    assert unshard((0, 3, 7), 1).tolist() == list(range(7))


def test_a_document_that_does_not_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"document 1 .* 6 tokens.*document_alignment=4"):
        shard((0, 8, 14), 2, 0)


def partitioned_indices(cu_seqlens: list[int], total: int, size: int, rank: int) -> list[int]:
    """`thd_get_partitioned_indices` as its CUDA kernel states it (Transformer Engine,
    common/fused_attn/context_parallel.cu): for each slot of the rank's output, find the sequence
    it falls into, then map the first half of its slots to chunk `rank` and the second half to
    chunk `2 * size - 1 - rank`."""
    starts = [boundary // size for boundary in cu_seqlens]
    result = []
    for slot in range(total // size):
        sequence = max(i for i, start in enumerate(starts[:-1]) if start <= slot)
        length = starts[sequence + 1] - starts[sequence]
        index = slot - starts[sequence]
        offset = cu_seqlens[sequence]
        if index < length // 2:
            index += rank * length // 2
        else:
            index += (size - 1) * length - (rank * length) // 2
        result.append(index + offset)
    return result


packs = st.tuples(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=6))


@given(packs)
def test_shards_are_those_of_transformer_engine(pack: tuple[int, list[int]]) -> None:
    size, chunks = pack
    lengths = [2 * size * chunk for chunk in chunks]
    boundaries = [0, *np.cumsum(lengths).tolist()]
    for rank in range(size):
        if size > 1:
            expected = partitioned_indices(boundaries, boundaries[-1], size, rank)
            assert shard(boundaries, size, rank).tolist() == expected
    everything = np.arange(boundaries[-1]) * 7 + 3
    together = np.concatenate([everything[shard(boundaries, size, r)] for r in range(size)])
    assert (together[unshard(boundaries, size)] == everything).all()
    assert (joined(boundaries, size)[unshard(boundaries, size)] == np.arange(boundaries[-1])).all()


@given(packs, st.booleans())
def test_segments_cover_what_a_causal_mask_does(pack: tuple[int, list[int]], padding: bool) -> None:
    """Every query's keys are its document up to and with itself."""
    size, chunks = pack
    lengths = [2 * size * chunk for chunk in chunks]
    boundaries = [0, *np.cumsum(lengths).tolist()]
    costs = []
    for rank in range(size):
        places = iter(shard(boundaries, size, rank).tolist())
        cost = 0
        for count, document, num_keys in causal_segments(boundaries, size, rank, padding=padding):
            queries = [next(places) for _ in range(count)]
            start = boundaries[document]
            assert all(start <= query < boundaries[document + 1] for query in queries)
            if num_keys == 0:
                assert padding
                assert document == len(chunks) - 1
                continue
            assert queries == list(range(start + num_keys - count, start + num_keys))
            cost += sum(query - start + 1 for query in queries)
        assert not list(places)
        costs.append(cost)
    # Zig-zag: the same number of scores for every rank, exactly.
    assert len(set(costs)) == 1


def test_segments_of_two_ranks() -> None:
    boundaries = (0, 8, 12)
    assert causal_segments(boundaries, 2, 0, padding=False) == (
        Segment(2, 0, 2),
        Segment(2, 0, 8),
        Segment(1, 1, 1),
        Segment(1, 1, 4),
    )
    assert causal_segments(boundaries, 2, 1, padding=True) == (
        Segment(2, 0, 4),
        Segment(2, 0, 6),
        Segment(2, 1, 0),
    )
