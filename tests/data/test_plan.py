"""The planner: pure, complete, never over the cap, well filled."""

from collections import Counter
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.data.plan import (
    PackPlan,
    PlanSample,
    best_fit_decreasing,
    sample_stream,
    shuffled,
)


def mix(count: int, seed: int = 0) -> list[PlanSample]:
    """Two sources with the spread of lengths of a real mix: many short, a few long."""
    random = Random(seed)
    samples = []
    for index in range(count):
        length = min(512, max(12, int(random.lognormvariate(4.4, 0.7))))
        source = "ab"[index % 2]
        samples.append(PlanSample(f"{source}{index}", source, length))
    return samples


def plan(samples: list[PlanSample], **settings: object) -> PackPlan:
    chosen = {"sequence_length": 512, "window": 200, "seed": 3, **settings}
    return PackPlan(samples, {"a": 1.0, "b": 1.0}, **chosen)  # type: ignore[arg-type]


def test_every_sample_once_an_epoch() -> None:
    samples = mix(100)
    stream = list(islice(sample_stream(samples, {"a": 1, "b": 1}, 1), 300))
    for start in (0, 100, 200):
        keys = [sample.key for sample in stream[start : start + 100]]
        assert sorted(keys) == sorted(sample.key for sample in samples)
    assert stream[:100] != stream[100:200], "epochs are shuffled anew"


def test_shares_follow_the_weights_closely() -> None:
    samples = [PlanSample(f"{s}{i}", s, 10) for s in "abc" for i in range(7)]
    weights = {"a": 5.0, "b": 3.0, "c": 0.5}
    stream = islice(sample_stream(samples, weights, 1), 850)
    count: Counter[str] = Counter()
    for number, sample in enumerate(stream, start=1):
        count[sample.source] += 1
        for source, weight in weights.items():
            assert abs(count[source] - number * weight / 8.5) < 2
    assert count == {"a": 500, "b": 300, "c": 50}


def test_shuffles_do_not_depend_on_the_order_of_the_list() -> None:
    samples = mix(50)
    assert shuffled(samples, 1, 0) == shuffled(samples[::-1], 1, 0)
    assert shuffled(samples, 1, 0) != shuffled(samples, 2, 0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=60),
    st.integers(1, 40),
    st.integers(0, 5),
)
def test_packs_hold_the_stream_and_never_too_much(
    lengths: list[int], window: int, seed: int
) -> None:
    samples = [PlanSample(f"k{i}", "a", length) for i, length in enumerate(lengths)]
    made = PackPlan(samples, {"a": 1}, sequence_length=64, window=window, seed=seed)
    packs = made.packs(0, 50)
    assert all(packs)
    assert all(sum(sample.length for sample in pack) <= 64 for pack in packs)
    again = PackPlan(samples, {"a": 1}, sequence_length=64, window=window, seed=seed)
    assert again[49] == packs[49], "a pack does not depend on what was asked for before it"
    seen = Counter(sample.key for pack in packs for sample in pack)
    rounds = len([s for pack in packs for s in pack]) / len(samples)
    late = 2 * window / len(samples) + 1
    assert all(abs(seen[sample.key] - rounds) <= late + 1 for sample in samples)


def test_nothing_is_lost_between_windows() -> None:
    samples = mix(600)
    made = plan(samples, window=100)
    packs = made.packs(0, 250)
    stream = Counter(
        sample.key for sample in islice(sample_stream(samples, {"a": 1, "b": 1}, 3), 3000)
    )
    packed = Counter(sample.key for pack in packs for sample in pack)
    assert not packed - stream
    assert packed.total() > 1200


def test_realistic_fill() -> None:
    packs = plan(mix(4000), window=500).packs(0, 700)
    filled = [sum(sample.length for sample in pack) / 512 for pack in packs]
    assert sum(filled) / len(filled) >= 0.97


def test_packing_off_gives_one_sample_each() -> None:
    packs = plan(mix(30), packing=False, window=7).packs(0, 30)
    assert [len(pack) for pack in packs] == [1] * 30
    assert len({pack[0].key for pack in packs}) == 30


def test_leftovers_are_carried_once() -> None:
    samples = [PlanSample(f"k{i}", "a", 40) for i in range(10)]
    packs = PackPlan(samples, {"a": 1}, sequence_length=64, window=5, seed=0).packs(0, 40)
    assert all(len(pack) == 1 for pack in packs)
    assert {sample.key for pack in packs for sample in pack} == {f"k{i}" for i in range(10)}


def test_best_fit_takes_the_fullest_pack_with_room() -> None:
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([7, 6, 3, 4], 10) == [[0, 2], [1, 3]]
    with pytest.raises(ValueError, match="11 tokens"):
        best_fit_decreasing([11], 10)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="weights above 0"):
        next(sample_stream([], {}, 0))
    with pytest.raises(ValueError, match="no samples that fit"):
        next(sample_stream(mix(4), {"a": 1, "z": 1}, 0))
    with pytest.raises(ValueError, match="window is 0"):
        plan(mix(4), window=0)
    with pytest.raises(ValueError, match="from 0"):
        plan(mix(4))[-1]
