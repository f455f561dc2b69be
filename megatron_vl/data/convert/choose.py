"""Which rows are taken and which are held out: by hash, so that choices nest and never depend on
order, workers or what else is in the source.

A row belongs to the fraction f if its hash lies below f: the tenth is part of the fifth. Rows that
show the same image are held out together, so that no held-out question is about a training image.
"""

import hashlib


def _unit(*words: object) -> float:
    """A number in [0, 1), as good as random, the same everywhere."""
    digest = hashlib.blake2b("\x1f".join(map(str, words)).encode(errors="replace"), digest_size=8)
    return int.from_bytes(digest.digest(), "big") / 2**64


def is_chosen(seed: int, file: str, row: int, fraction: float) -> bool:
    """Whether a row belongs to a fraction of its source."""
    return fraction >= 1 or _unit("fraction", seed, file, row) < fraction


def is_held_out(seed: int, subject: str, share: float) -> bool:
    """Whether what a row is about belongs to the held-out share."""
    return _unit("held out", seed, subject) < share
