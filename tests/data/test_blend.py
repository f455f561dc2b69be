"""The stream of samples: shares, epochs, ends; and the shuffle that needs no list."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.schema_data import BlendUnit, DataConfig, SourceEnd
from megatron_vl.data.blend import SampleStream, Share, SourceTable, shares_of
from megatron_vl.data.seeds import (
    half_bits,
    random_words,
    sample_seed,
    seed_of,
    shuffle_keys,
    shuffled,
)


def table(lengths: list[int], tiles: list[int] | None = None) -> SourceTable:
    return SourceTable(np.array(lengths), np.array(tiles or [0] * len(lengths)))


def stream(
    sizes: dict[str, int], shares: dict[str, Share], *, seed: int = 1, **chosen: object
) -> SampleStream:
    tables = {source: table([5] * size) for source, size in sizes.items()}
    return SampleStream(tables, shares, most_tokens=10, most_tiles=3, seed=seed, **chosen)  # type: ignore[arg-type]


def take(made: SampleStream, count: int) -> list[tuple[str, int, int]]:
    """Source, place in its table and epoch of the next samples."""
    drawn = made.take(count)
    index_N, epoch_N = made.locate(drawn)
    names = [made.sources[at] for at in drawn.source_N.tolist()]
    return list(zip(names, index_N.tolist(), epoch_N.tolist(), strict=True))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.floats(0.01, 50)), min_size=1, max_size=6),
    st.lists(st.integers(1, 70), min_size=1, max_size=12),
)
def test_the_stream_is_the_merge_of_evenly_spaced_samples(
    sources: list[tuple[int, float]], counts: list[int]
) -> None:
    """However it is cut into windows, and within a sample or so of every share."""
    names = [f"s{at}" for at in range(len(sources))]
    shares = {name: Share(weight) for name, (_, weight) in zip(names, sources, strict=True)}
    sizes = {name: size for name, (size, _) in zip(names, sources, strict=True)}
    made = stream(sizes, shares)
    mine = [sample for count in counts for sample in take(made, count)]
    total = sum(counts)
    stands = sorted(
        ((draw + 0.5) / share.weight, at)
        for at, share in enumerate(shares.values())
        for draw in range(total)
    )
    assert [name for name, _, _ in mine] == [names[at] for _, at in stands[:total]]
    whole = sum(share.weight for share in shares.values())
    for name, share in shares.items():
        given_out = sum(1 for sample in mine if sample[0] == name)
        assert abs(given_out - total * share.weight / whole) <= 1 + len(names) / 2


def test_every_sample_once_an_epoch_and_epochs_differ() -> None:
    made = stream({"a": 50, "b": 20}, {"a": Share(5.0), "b": Share(2.0)})
    epochs = [take(made, 70) for _ in range(3)]
    for number, samples in enumerate(epochs):
        assert len(set(samples)) == 70
        assert {epoch for _, _, epoch in samples} == {number}
    orders = [[index for name, index, _ in samples if name == "a"] for samples in epochs]
    assert orders[0] != orders[1] != orders[2]
    other = stream({"a": 50, "b": 20}, {"a": Share(5.0), "b": Share(2.0)}, seed=2)
    assert take(other, 70) != epochs[0]


def test_a_source_that_has_given_its_epochs_ends() -> None:
    made = stream({"a": 40, "b": 30}, {"a": Share(1.0, 2.0), "b": Share(1.0, 0.5)})
    samples = take(made, 1000)
    count = Counter(name for name, _, _ in samples)
    assert count == {"a": 80, "b": 15}
    assert len(set(samples)) == 95, "half an epoch repeats nothing"
    assert [name for name, _, _ in samples[30:]] == ["a"] * 65, "the others go on"
    assert made.total == 95
    assert take(made, 5) == []


def test_the_stream_may_end_with_the_first_source_that_ends() -> None:
    shares = {"a": Share(1.0, 2.0), "b": Share(1.0, 0.5), "c": Share(2.0)}
    made = stream({"a": 40, "b": 30, "c": 9}, shares, when_source_ends=SourceEnd.stop)
    count = Counter(name for name, _, _ in take(made, 1000))
    assert count["b"] == 15
    assert abs(count["a"] - 15) <= 1
    assert abs(count["c"] - 30) <= 1


def test_a_stream_goes_on_from_what_each_source_has_given() -> None:
    shares = {"a": Share(1.0, 3.0), "b": Share(0.3)}
    made = stream({"a": 40, "b": 30}, shares)
    whole = [take(made, 33) for _ in range(5)]
    again = stream({"a": 40, "b": 30}, shares)
    take(again, 33)
    drawn = list(again.drawn)
    third = stream({"a": 40, "b": 30}, shares)
    third.drawn = drawn
    assert [take(third, 33) for _ in range(4)] == whole[1:]


def test_samples_that_fit_nowhere_are_left_out_and_counted() -> None:
    tables = {
        "a": table([3, 0, 11, 10, 2], [0, 0, 0, 4, 3]),
        "b": table([1, 1]),
    }
    made = SampleStream(
        tables, {"a": Share(1.0), "b": Share(1.0)}, most_tokens=10, most_tiles=3, seed=0
    )
    assert made.left_out == {"a": 3, "b": 0}
    assert {index for name, index, _ in take(made, 40) if name == "a"} == {0, 4}
    with pytest.raises(ValueError, match="names a, which have no samples that fit"):
        SampleStream({"a": table([11])}, {"a": Share(1.0)}, most_tokens=10, most_tiles=3, seed=0)


def test_weights_of_tokens_are_divided_by_mean_lengths() -> None:
    data = DataConfig(blend={"a": 2.0, "b": 1.0}, epochs={"b": 1.5}, blend_unit=BlendUnit.tokens)
    shares = shares_of(data, {"a": 100.0, "b": 20.0})
    assert shares == {"a": Share(0.02), "b": Share(0.05, 1.5)}
    assert shares_of(data, {"a": 100.0, "b": 20.0}, endless=True)["b"].epochs == 0
    plain = replace(data, blend_unit=BlendUnit.samples)
    assert shares_of(plain, {"a": 100.0, "b": 20.0})["a"] == Share(2.0)


def test_a_blend_needs_weights() -> None:
    for shares in ({}, {"a": Share(0.0)}, {"a": Share(-1.0)}, {"a": Share(float("inf"))}):
        with pytest.raises(ValueError, match="needs weights above 0"):
            stream(dict.fromkeys(shares, 4), shares)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 99))
def test_a_shuffle_is_a_permutation(size: int, seed: int) -> None:
    places = np.arange(size)
    keys = np.tile(shuffle_keys(seed), (size, 1))
    sizes, halves = np.full(size, size), np.full(size, half_bits(size))
    order = shuffled(places, sizes, halves, keys)
    assert sorted(order.tolist()) == list(range(size))
    few = places[:: max(1, size // 7)]
    assert (shuffled(few, sizes[few], halves[few], keys[few]) == order[few]).all()


def test_shuffles_look_random() -> None:
    """Which of 12 comes first, and how far neighbours are apart, over 4000 seeds."""
    size, trials = 12, 4000
    keys = np.concatenate([np.tile(shuffle_keys(seed), (size, 1)) for seed in range(trials)])
    total = size * trials
    orders = shuffled(
        np.tile(np.arange(size), trials),
        np.full(total, size),
        np.full(total, half_bits(size)),
        keys,
    ).reshape(trials, size)
    expected = trials / size
    for place in (0, 1, 5, 11):
        counts = np.bincount(orders[:, place], minlength=size)
        # 99.99th percentile of chi square with 11 degrees of freedom is 37.4.
        assert float(((counts - expected) ** 2 / expected).sum()) < 37.4
    pairs = np.bincount(orders[:, 0] * size + orders[:, 1], minlength=size * size)
    assert (pairs > 0).sum() == size * (size - 1)


def test_seeds_depend_on_every_word_and_on_nothing_else() -> None:
    seeds = {
        sample_seed(run, source, key, epoch)
        for run in (1, 2)
        for source in ("a", "b")
        for key in ("k", "ab")
        for epoch in (0, 1)
    }
    assert len(seeds) == 16
    assert sample_seed(1, "a", "k", 0) == 13_935_411_225_007_569_601
    assert seed_of("ab", "c") != seed_of("a", "bc")
    assert random_words(3, 7).tolist() == random_words(5, 7)[:3].tolist()
