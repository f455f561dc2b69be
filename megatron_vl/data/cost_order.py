"""The order of packs: equally heavy packs meet in one step.

Data-parallel ranks wait for the heaviest pack of a step, and packs of equal length differ in tiles
and in the squares of their documents. `aligned_order` sorts the packs of a round by cost and cuts
them into runs whose packs cost nearly the same; the runs then come in random order, one or several
of them a global batch. `deal` gives each rank its packs of a batch back and forth, lightest first
on the way there, heaviest first on the way back: ranks that share runs evenly have even sums.

The plan does not know the number of ranks: any divisor of the global batch gets the same batches,
and any divisor of the run even ones. What it costs: packs of equal cost resemble each other (all
text, or all pictures). Runs as long as a global batch make steps of one kind, which a small model
learns less from; runs of as many packs as there are ranks leave the batches mixed.
"""

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.seeds import random_words


def shuffled_order(count: int, *words: object) -> NDArray[np.int64]:
    """0 ... count - 1 in an order that depends on the words."""
    return np.argsort(random_words(count, *words), kind="stable")


def aligned_order(costs_P: NDArray[np.int64], run: int, *words: object) -> NDArray[np.int64]:
    """Packs ordered so that each `run` of them are neighbours in cost, the runs in random order.

    Where `run` does not divide their number, the heaviest run is shorter.
    """
    by_cost = np.argsort(costs_P, kind="stable")
    runs_P = np.arange(len(costs_P)) // run
    place_of_run = np.argsort(shuffled_order(-(-len(costs_P) // run), *words))
    return by_cost[np.argsort(place_of_run[runs_P], kind="stable")]


def deal(batch: int, rank: int, size: int) -> list[int]:
    """Places in a global batch of one rank's packs, in the order the rank trains on them.

    The packs that ranks train on at the same time are neighbours.

    Raises:
        ValueError: the batch is no multiple of size.
    """
    if batch % size:
        nearest = max(1, round(batch / size)) * size
        raise ValueError(
            f"train.global_batch is {batch} for {size} data-parallel ranks; it must be a multiple "
            f"of their number, the nearest is {nearest}"
        )
    return [
        turn * size + (rank if turn % 2 == 0 else size - 1 - rank) for turn in range(batch // size)
    ]
