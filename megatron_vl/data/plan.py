"""The order of training: which samples go into which pack.

A pure function of the samples' lengths, the blend, the sequence length, the window and the seed.
Packs have numbers, and the number of the next pack is the whole state of the data order: any rank
of any layout that asks for pack n gets the same one.

Samples come as one endless stream. Every source goes through its own epochs, shuffled anew each
time; the stream takes at each step from the source that is furthest behind its share. The packer
looks at a window of the stream at a time: best-fit decreasing, then packs that stay too empty give
their samples back to the next window, once.

Cost: about 10 microseconds a sample, spent window by window as packs are asked for.
"""

import hashlib
from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

FULL_ENOUGH = 0.98
"""Packs filled less give their samples back to the next window, unless one came from the last."""


@dataclass(frozen=True)
class PlanSample:
    """What the planner knows of a sample. [tokens; tiles]"""

    key: str
    source: str
    length: int
    tiles: int = 0


def _rank(*words: object) -> bytes:
    """A number to sort by, as good as random, the same everywhere."""
    return hashlib.blake2b("\x1f".join(map(str, words)).encode(), digest_size=8).digest()


def shuffled(samples: Sequence[PlanSample], seed: int, epoch: int) -> list[PlanSample]:
    """The samples of one source in the order of one epoch."""
    return sorted(samples, key=lambda sample: (_rank(seed, epoch, sample.key), sample.key))


def sample_stream(
    samples: Sequence[PlanSample], blend: Mapping[str, float], seed: int
) -> Iterator[PlanSample]:
    """The endless stream of samples.

    After n samples every source has had its share of n, to within a few samples. A source that has
    given all its samples starts its next epoch; other sources do not wait for it.

    Raises:
        ValueError: the blend is empty, a weight is negative, or a source has no samples.
    """
    weights = {source: float(weight) for source, weight in blend.items() if weight != 0}
    if not weights or min(weights.values()) < 0:
        raise ValueError(f"the blend is {dict(blend)}; it needs weights above 0")
    by_source: dict[str, list[PlanSample]] = {source: [] for source in weights}
    for sample in samples:
        if sample.source in by_source:
            by_source[sample.source].append(sample)
    empty = [source for source, members in by_source.items() if not members]
    if empty:
        raise ValueError(f"the blend names {', '.join(empty)}, which have no samples that fit")
    total = sum(weights.values())
    names = sorted(weights)
    behind = dict.fromkeys(names, 0.0)
    queues: dict[str, list[PlanSample]] = {name: [] for name in names}
    epochs = dict.fromkeys(names, 0)
    while True:
        for name in names:
            behind[name] += weights[name] / total
        name = max(names, key=lambda candidate: behind[candidate])
        behind[name] -= 1.0
        if not queues[name]:
            queues[name] = shuffled(by_source[name], seed, epochs[name])[::-1]
            epochs[name] += 1
        yield queues[name].pop()


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices grouped into packs of at most `capacity`: longest first, each into the fullest pack
    that still has room.

    Raises:
        ValueError: a length above the capacity.
    """
    packs: list[list[int]] = []
    spaces: list[tuple[int, int]] = []
    for index in sorted(range(len(lengths)), key=lambda at: (-lengths[at], at)):
        length = lengths[index]
        if length > capacity:
            raise ValueError(f"sample {index} has {length} tokens; a pack holds {capacity}")
        at = bisect_left(spaces, (length, -1))
        if at == len(spaces):
            packs.append([index])
            space, pack = capacity - length, len(packs) - 1
        else:
            space, pack = spaces.pop(at)
            packs[pack].append(index)
            space -= length
        insort(spaces, (space, pack))
    return packs


class PackPlan:
    """The endless list of packs. `plan[n]` is the n-th pack: a tuple of samples.

    Args:
        samples: every sample of the sources, in any order.
        blend: share of samples of each source.
        sequence_length: most tokens of a pack.
        window: samples the packer looks at together.
        seed: of the shuffles.
        packing: off puts one sample in each pack.
    """

    def __init__(
        self,
        samples: Sequence[PlanSample],
        blend: Mapping[str, float],
        *,
        sequence_length: int,
        window: int,
        seed: int,
        packing: bool = True,
    ):
        if window < 1:
            raise ValueError(f"the packing window is {window}; it must be at least 1 sample")
        self._stream = sample_stream(samples, blend, seed)
        self._capacity, self._window = sequence_length, window
        self._seed, self._packing = seed, packing
        self._carried: list[PlanSample] = []
        self._windows = 0
        self._packs: list[tuple[PlanSample, ...]] = []

    def __getitem__(self, number: int) -> tuple[PlanSample, ...]:
        """Pack `number`; plans as many windows as it takes."""
        if number < 0:
            raise ValueError(f"pack {number} was asked for; packs are numbered from 0")
        while number >= len(self._packs):
            self._extend()
        return self._packs[number]

    def packs(self, start: int, stop: int) -> list[tuple[PlanSample, ...]]:
        """Packs start ... stop - 1."""
        return [self[number] for number in range(start, stop)]

    def _extend(self) -> None:
        """Plan one more window."""
        fresh = [next(self._stream) for _ in range(self._window)]
        if not self._packing:
            self._packs += [(sample,) for sample in fresh]
            return
        members = self._carried + fresh
        num_carried = len(self._carried)
        grouped = best_fit_decreasing([sample.length for sample in members], self._capacity)
        carried: list[int] = []
        ready: list[tuple[PlanSample, ...]] = []
        for indices in grouped:
            filled = sum(members[index].length for index in indices)
            if filled < FULL_ENOUGH * self._capacity and min(indices) >= num_carried:
                carried += indices
            else:
                ready.append(tuple(members[index] for index in sorted(indices)))
        order = sorted(range(len(ready)), key=lambda at: _rank(self._seed, self._windows, at))
        self._packs += [ready[at] for at in order]
        self._carried = [members[index] for index in sorted(carried)]
        self._windows += 1
