"""Seeds and shuffles that depend on names and numbers alone.

The same on every machine and with every version of Python and NumPy: nothing here uses a random
generator's stream. `shuffled` finds the sample at any place of a shuffled order without making the
order, so a source of 30 million samples starts at once.
"""

import hashlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

ROUNDS = 6
"""Feistel rounds of a shuffle; four already pass for random."""

Words = NDArray[np.uint64]


def seed_of(*words: object) -> int:
    """A number of 64 bits, as good as random, that depends on all the words."""
    text = "\x1f".join(map(str, words))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def sample_seed(run_seed: int, source: str, key: str, epoch: int) -> int:
    """Seed of whatever is drawn for one sample in one epoch: augmentation, pruning of video.

    It does not depend on ranks, workers, or the place of the sample in the data order.
    """
    return seed_of("sample", run_seed, source, key, epoch)


def mixed(words: Words) -> Words:
    """Each word to another as good as random one (the finaliser of splitmix64)."""
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


def random_words(count: int, *words: object) -> Words:
    """`count` random words; sort by them for a shuffle of a short list."""
    start = np.uint64(seed_of(*words))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return mixed(steps + start)


@lru_cache(maxsize=4096)
def shuffle_keys(*words: object) -> Words:
    """The keys of one shuffle, (ROUNDS)."""
    return random_words(ROUNDS, "shuffle", *words)


def half_bits(size: int) -> int:
    """Bits of one half of the numbers a shuffle of `size` works on."""
    return max(1, -(-max(size - 1, 1).bit_length() // 2))


def shuffled(
    places_N: NDArray[np.int64],
    sizes_N: NDArray[np.int64],
    halves_N: NDArray[np.int64],
    keys_NR: Words,
) -> NDArray[np.int64]:
    """What stands at places of shuffled orders, each place in an order of its own.

    A Feistel network permutes the numbers below 4^halves; results at or above the size go through
    again until they are below it (two to four times on average).

    Args:
        places_N: from 0, below the size.
        sizes_N: length of each place's order.
        halves_N: `half_bits` of each size.
        keys_NR: `shuffle_keys` of each order.
    """
    found_N = np.array(places_N, dtype=np.uint64)
    shifts_N = halves_N.astype(np.uint64)
    masks_N = (np.uint64(1) << shifts_N) - np.uint64(1)
    outside = np.arange(len(found_N))
    while len(outside):  # a permutation's cycle comes back to the place itself at the latest
        left, right = found_N[outside] >> shifts_N[outside], found_N[outside] & masks_N[outside]
        for step in range(ROUNDS):
            turned = mixed(right + keys_NR[outside, step]) & masks_N[outside]
            left, right = right, left ^ turned
        found_N[outside] = (left << shifts_N[outside]) | right
        outside = outside[found_N[outside] >= sizes_N[outside].astype(np.uint64)]
    return found_N.astype(np.int64)
