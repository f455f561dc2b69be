"""Equally heavy packs meet: batches of neighbours in cost, dealt so that sums are even too."""

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.cost.flops import pack_flops
from megatron_vl.cost.pack_cost import pack_cost
from megatron_vl.data.cost_order import aligned_order, deal, shuffled_order
from tests.support.sizes import full_size, small


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 9), st.integers(1, 60), st.integers(0, 3))
def test_runs_are_neighbours_in_cost_in_random_order(run: int, count: int, seed: int) -> None:
    costs = np.array([Random(seed).randrange(40) for _ in range(count)])
    order = aligned_order(costs, run, seed, "round", 0).tolist()
    assert sorted(order) == list(range(count))
    # Cut again where the runs must be: all of one length but the heaviest.
    by_cost = np.argsort(costs, kind="stable").tolist()
    runs = [by_cost[at : at + run] for at in range(0, count, run)]
    seen = []
    while order:
        members = next(members for members in runs if members[0] == order[0])
        assert order[: len(members)] == members, "lightest first"
        seen.append(runs.index(members))
        order = order[len(members) :]
    assert sorted(seen) == list(range(len(runs)))


def test_the_order_of_runs_depends_on_the_words_alone() -> None:
    costs = np.arange(60)
    assert (aligned_order(costs, 3, 1, "a") == aligned_order(costs, 3, 1, "a")).all()
    assert (aligned_order(costs, 3, 1, "a") != aligned_order(costs, 3, 2, "a")).any()
    assert sorted(shuffled_order(60, 1).tolist()) == list(range(60))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 6))
def test_every_rank_count_shares_the_same_batch(size: int, turns: int) -> None:
    batch = size * turns
    shares = [deal(batch, rank, size) for rank in range(size)]
    assert sorted(place for share in shares for place in share) == list(range(batch))
    for turn in range(turns):
        assert {share[turn] // size for share in shares} == {turn}, "neighbours train together"
    if turns % 2 == 0:
        assert len({sum(share) for share in shares}) == 1, "there and back evens out"


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="the nearest is 3"):
        deal(4, 0, 3)


@pytest.mark.parametrize("trainable", [{"projector"}, {"encoder", "projector", "decoder"}])
@pytest.mark.parametrize("size", ["12B", "small"])
def test_the_cost_of_a_pack_is_its_flops(size: str, trainable: set[str]) -> None:
    model, length, tile, edge = (
        (full_size(), 16384, 512, 32) if size == "12B" else (small("M-*M"), 512, 8, 4)
    )
    cost = pack_cost(model, sequence_length=length, tile_size=tile, trainable=trainable)
    random = Random(7)
    for _ in range(20):
        documents = [random.randrange(1, length // 8) for _ in range(8)]
        tiles = random.randrange(1, 70)
        flops = pack_flops(
            model,
            document_lengths=documents,
            padded_length=length,
            grids=[(edge, edge)] * tiles,
            trainable=trainable,
        )
        squares = sum(document**2 for document in documents)
        assert cost.of(length, tiles, squares) == flops.total
