"""Packers: which samples of a window share a sequence.

Each takes the samples' lengths and tiles and gives back the pack of each sample, under three limits
(tokens, tiles, samples of a pack). All are pure.

    best_fit           longest first, each into the fullest pack with room; the default
    greedy_knapsack    fill one pack after the other, always with the largest sample that still fits
                       (the packer of the public Megatron-LM code)
    first_fit          in the order of the stream, each into the first pack with room
    balanced           longest first, each into the emptiest of a number of packs opened beforehand
                       (the published balance-aware packer: evenly filled packs, a lower fill)

Refuses a sample that fits no pack: who plans must leave it out. Cost, 10,000 samples: best_fit and
greedy_knapsack about 10 ms, balanced 15 ms, first_fit 0.1 s.
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema_data import Packer

Ints = NDArray[np.integer]
PackOf = NDArray[np.int64]
"""The pack of each sample; packs are numbered from 0 without gaps."""

NO_LIMIT = 1 << 62


@dataclass(frozen=True)
class PackLimits:
    """The most one pack may hold; 0 tiles or samples means no limit. [tokens; tiles; samples]"""

    tokens: int
    tiles: int = 0
    samples: int = 0

    @property
    def most_tiles(self) -> int:
        """Tiles as a number to compare with."""
        return self.tiles or NO_LIMIT

    @property
    def most_samples(self) -> int:
        """Samples as a number to compare with."""
        return self.samples or NO_LIMIT


def pack(
    packer: Packer, lengths: Ints, tiles: Ints, limits: PackLimits, spare_packs: float = 0.0
) -> PackOf:
    """The pack of each sample.

    Args:
        spare_packs: packs that `balanced` opens beyond the fewest possible: a fraction of those
            below 1, a number from 1 on.

    Raises:
        ValueError: a sample alone is over a limit.
    """
    if len(lengths) == 0:
        return np.empty(0, dtype=np.int64)
    for name, sizes, most in (
        ("tokens", lengths, limits.tokens),
        ("tiles", tiles, limits.most_tiles),
    ):
        at = int(np.argmax(sizes))
        if sizes[at] > most:
            raise ValueError(f"sample {at} has {sizes[at]} {name}; a pack holds {most}")
    if packer is Packer.balanced:
        return balanced(lengths, tiles, limits, spare_packs)
    return _PACKERS[packer](lengths, tiles, limits)


def fewest_packs(lengths: Ints, limits: PackLimits) -> int:
    """No packing has fewer packs: the samples' tokens over those of a pack, rounded up."""
    return -(-int(lengths.sum()) // limits.tokens)


def longest_first(lengths: Ints) -> list[int]:
    """Sample numbers by falling length; equally long ones in their order."""
    return np.argsort(-lengths.astype(np.int64), kind="stable").tolist()


def best_fit(lengths: Ints, tiles: Ints, limits: PackLimits) -> PackOf:
    """Best-fit decreasing."""
    stride = len(lengths)
    most_tiles, most_samples = limits.most_tiles, limits.most_samples
    sizes, needs = lengths.tolist(), tiles.tolist()
    pack_of = [0] * stride
    used_tiles: list[int] = []
    counts: list[int] = []
    # Packs by room, as room * stride + pack: integers compare faster than pairs.
    rooms: list[int] = []
    for sample in longest_first(lengths):
        size, need = sizes[sample], needs[sample]
        at = bisect_left(rooms, size * stride)
        while at < len(rooms) and used_tiles[rooms[at] % stride] + need > most_tiles:
            at += 1
        if at < len(rooms):
            room, chosen = divmod(rooms.pop(at), stride)
        else:
            room, chosen = limits.tokens, len(counts)
            used_tiles.append(0)
            counts.append(0)
        pack_of[sample] = chosen
        used_tiles[chosen] += need
        counts[chosen] += 1
        if counts[chosen] < most_samples:
            entry = (room - size) * stride + chosen
            rooms.insert(bisect_left(rooms, entry), entry)
    return np.array(pack_of, dtype=np.int64)


def greedy_knapsack(lengths: Ints, tiles: Ints, limits: PackLimits) -> PackOf:
    """One pack after the other, each filled with the largest sample that still fits."""
    most_tiles, most_samples = limits.most_tiles, limits.most_samples
    waiting = longest_first(lengths)[::-1]
    sizes = lengths[waiting].tolist()
    needs = tiles[waiting].tolist()
    pack_of = [0] * len(sizes)
    number = 0
    while waiting:
        room, room_tiles, count = limits.tokens, most_tiles, 0
        while count < most_samples:
            at = bisect_right(sizes, room) - 1
            while at >= 0 and needs[at] > room_tiles:
                at -= 1
            if at < 0:
                break
            room -= sizes.pop(at)
            room_tiles -= needs.pop(at)
            pack_of[waiting.pop(at)] = number
            count += 1
        number += 1
    return np.array(pack_of, dtype=np.int64)


def first_fit(lengths: Ints, tiles: Ints, limits: PackLimits) -> PackOf:
    """Each sample, in the order given, into the first pack with room."""
    total = len(lengths)
    room = np.full(total, limits.tokens, dtype=np.int64)
    room_tiles = np.full(total, limits.most_tiles, dtype=np.int64)
    room_samples = np.full(total, limits.most_samples, dtype=np.int64)
    pack_of = np.empty(total, dtype=np.int64)
    opened = 0
    for sample, (size, need) in enumerate(zip(lengths.tolist(), tiles.tolist(), strict=True)):
        # One pack more than are open: an empty one always has room.
        fits = room[: opened + 1] >= size
        fits &= room_tiles[: opened + 1] >= need
        fits &= room_samples[: opened + 1] > 0
        chosen = int(fits.argmax())
        opened = max(opened, chosen + 1)
        pack_of[sample] = chosen
        room[chosen] -= size
        room_tiles[chosen] -= need
        room_samples[chosen] -= 1
    return pack_of


def balanced(lengths: Ints, tiles: Ints, limits: PackLimits, spare_packs: float = 0.0) -> PackOf:
    """Longest first, each into the emptiest pack, or into a new one where that has no room.

    Packs that stay empty do not count. `spare_packs` of 20 is published, for windows of many
    thousand samples; small windows want a fraction.
    """
    fewest = fewest_packs(lengths, limits)
    spare = spare_packs if spare_packs >= 1 else fewest * spare_packs
    sizes, needs = lengths.tolist(), tiles.tolist()
    opened = fewest + math.floor(spare)
    used_tiles, counts = [0] * opened, [0] * opened
    filled = [(0, number) for number in range(opened)]
    pack_of = np.empty(len(sizes), dtype=np.int64)
    for sample in longest_first(lengths):
        size, need = sizes[sample], needs[sample]
        used, chosen = filled[0]
        if (
            used + size > limits.tokens
            or used_tiles[chosen] + need > limits.most_tiles
            or counts[chosen] >= limits.most_samples
        ):
            used, chosen = 0, len(counts)
            used_tiles.append(0)
            counts.append(0)
            heapq.heappush(filled, (size, chosen))
        else:
            heapq.heapreplace(filled, (used + size, chosen))
        used_tiles[chosen] += need
        counts[chosen] += 1
        pack_of[sample] = chosen
    return np.unique(pack_of, return_inverse=True)[1].astype(np.int64)


_PACKERS: dict[Packer, Callable[[Ints, Ints, PackLimits], PackOf]] = {
    Packer.best_fit: best_fit,
    Packer.greedy_knapsack: greedy_knapsack,
    Packer.first_fit: first_fit,
}
