"""The packers: within every limit, complete, as good as they say, equal to a plain reference."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.schema_data import Packer
from megatron_vl.data.packing import PackLimits, balanced, best_fit, first_fit, pack

Sizes = list[tuple[int, int]]


def packed(packer: Packer, sizes: Sizes, limits: PackLimits, spare: float = 0.0) -> list[list[int]]:
    """Packs as lists of sample numbers, in the order the packer numbers them."""
    lengths, tiles = np.array(sizes, dtype=np.int64).reshape(-1, 2).T
    pack_of = pack(packer, lengths, tiles, limits, spare).tolist()
    packs: list[list[int]] = [[] for _ in range(max(pack_of, default=-1) + 1)]
    for sample, number in enumerate(pack_of):
        packs[number].append(sample)
    return packs


def plain_best_fit(
    sizes: Sizes, limits: PackLimits, *, decreasing: bool, best: bool
) -> list[list[int]]:
    """Best-fit decreasing, or first-fit, by looking at every pack every time."""
    packs: list[list[int]] = []

    def total(members: list[int], column: int) -> int:
        return sum(sizes[member][column] for member in members)

    order = (
        sorted(range(len(sizes)), key=lambda at: -sizes[at][0]) if decreasing else range(len(sizes))
    )
    for sample in order:
        length, tiles = sizes[sample]
        fitting = [
            members
            for members in packs
            if total(members, 0) + length <= limits.tokens
            and (not limits.tiles or total(members, 1) + tiles <= limits.tiles)
            and (not limits.samples or len(members) < limits.samples)
        ]
        if not fitting:
            packs.append([sample])
        elif best:
            min(fitting, key=lambda members: limits.tokens - total(members, 0)).append(sample)
        else:
            fitting[0].append(sample)
    return [sorted(members) for members in packs]


many_sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(0, 6)), min_size=1, max_size=50)
some_limits = st.builds(
    PackLimits, st.integers(60, 90), st.sampled_from([0, 6, 9]), st.sampled_from([0, 1, 3])
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(Packer)), many_sizes, some_limits, st.sampled_from([0.0, 0.3, 5.0]))
def test_every_sample_once_and_no_pack_over_a_limit(
    packer: Packer, sizes: Sizes, limits: PackLimits, spare: float
) -> None:
    packs = packed(packer, sizes, limits, spare)
    assert sorted(sample for members in packs for sample in members) == list(range(len(sizes)))
    for members in packs:
        assert members, "no empty packs"
        assert sum(sizes[member][0] for member in members) <= limits.tokens
        assert not limits.tiles or sum(sizes[member][1] for member in members) <= limits.tiles
        assert not limits.samples or len(members) <= limits.samples


@settings(max_examples=100, deadline=None)
@given(many_sizes, some_limits)
def test_first_fit_is_first_fit(sizes: Sizes, limits: PackLimits) -> None:
    expected = plain_best_fit(sizes, limits, decreasing=False, best=False)
    assert packed(Packer.first_fit, sizes, limits) == expected


@settings(max_examples=100, deadline=None)
@given(many_sizes, some_limits)
def test_best_fit_fills_as_the_plain_one(sizes: Sizes, limits: PackLimits) -> None:
    """Packs of equal room are as good as each other, so levels are compared, not members."""
    plain = PackLimits(limits.tokens, 0, limits.samples)  # a tile limit tells equal rooms apart
    expected = plain_best_fit(sizes, plain, decreasing=True, best=True)
    mine = packed(Packer.best_fit, sizes, plain)

    def levels(packs: list[list[int]]) -> list[int]:
        return sorted(sum(sizes[member][0] for member in members) for members in packs)

    if limits.samples == 0:
        assert levels(mine) == levels(expected)
    else:
        assert abs(len(mine) - len(expected)) <= max(1, len(expected) // 10)


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    nothing = np.zeros(5, dtype=np.int64)
    limits = PackLimits(10)
    assert best_fit(np.array([6, 5, 4, 3, 2]), nothing, limits).tolist() == [0, 1, 0, 1, 1]
    assert best_fit(np.array([7, 6, 3, 4]), nothing[:4], limits).tolist() == [0, 1, 0, 1]


def test_a_tile_limit_turns_to_the_next_fullest_pack() -> None:
    lengths, tiles = np.array([7, 5, 3, 3]), np.array([4, 1, 2, 0])
    assert best_fit(lengths, tiles, PackLimits(10, tiles=5)).tolist() == [0, 1, 1, 0]


def test_greedy_takes_the_largest_that_fits() -> None:
    lengths = np.array([6, 5, 4, 3, 2])
    pack_of = pack(Packer.greedy_knapsack, lengths, np.zeros(5, dtype=np.int64), PackLimits(10))
    assert pack_of.tolist() == [0, 1, 0, 1, 1]
    capped = pack(
        Packer.greedy_knapsack, lengths, np.zeros(5, dtype=np.int64), PackLimits(10, samples=1)
    )
    assert capped.tolist() == [0, 1, 2, 3, 4]


def test_balanced_fills_evenly_with_the_published_spare_packs() -> None:
    """20 spare packs, longest first, each into the least filled; plain lists as reference."""
    random = Random(5)
    lengths = [min(16384, int(random.lognormvariate(7.6, 0.9))) for _ in range(3000)]
    bins: list[list[int]] = [[] for _ in range(math.ceil(sum(lengths) / 16384) + 20)]
    for length in sorted(lengths, reverse=True):
        emptiest = min(bins, key=sum)
        if sum(emptiest) + length > 16384:
            emptiest = []
            bins.append(emptiest)
        emptiest.append(length)
    expected = sorted(sum(members) for members in bins if members)
    array = np.array(lengths)
    pack_of = balanced(array, np.zeros_like(array), PackLimits(16384), 20)
    assert sorted(np.bincount(pack_of, weights=array).astype(int).tolist()) == expected
    few = balanced(array, np.zeros_like(array), PackLimits(16384), 0.01)
    assert pack_of.max() > few.max(), "a fraction of the packs wastes less in a small window"


@pytest.mark.parametrize("packer", [Packer.best_fit, Packer.greedy_knapsack])
def test_realistic_mixes_reach_the_lower_bound(packer: Packer) -> None:
    random = Random(3)
    lengths = np.array([min(16384, int(random.lognormvariate(7.6, 0.9))) for _ in range(5000)])
    packs = int(pack(packer, lengths, np.zeros_like(lengths), PackLimits(16384)).max()) + 1
    assert packs <= math.ceil(1.001 * -(-int(lengths.sum()) // 16384))


def test_what_is_refused() -> None:
    for packer in Packer:
        with pytest.raises(ValueError, match="sample 1 has 11 tokens; a pack holds 10"):
            packed(packer, [(3, 0), (11, 0)], PackLimits(10))
        with pytest.raises(ValueError, match="sample 0 has 7 tiles; a pack holds 6"):
            packed(packer, [(3, 7), (4, 0)], PackLimits(10, tiles=6))
        assert packed(packer, [], PackLimits(10)) == []
    assert first_fit(np.array([4, 4]), np.array([0, 0]), PackLimits(8)).tolist() == [0, 0]
