"""Many packs as arrays: who is in which, in what order, and what each pack amounts to.

Shape suffixes: N members, P packs. Members of one pack stand together, packs one after the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class PackTable:
    """Packs and their members.

    source_N: number of the source. draw_N: how many samples the source had given before.
    index_N: place in the source's table. epoch_N: from 0. length_N: tokens, not padded.
    tiles_N: tiles. bounds_P: where each pack starts, and N at the end.
    """

    source_N: NDArray[np.int64]
    draw_N: NDArray[np.int64]
    index_N: NDArray[np.int64]
    epoch_N: NDArray[np.int64]
    length_N: NDArray[np.int64]
    tiles_N: NDArray[np.int64]
    bounds_P: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.bounds_P) - 1

    @property
    def members(self) -> tuple[NDArray[np.int64], ...]:
        """The arrays over members."""
        return (
            self.source_N, self.draw_N, self.index_N, self.epoch_N, self.length_N, self.tiles_N,
        )  # fmt: skip

    @staticmethod
    def grouped(members: Sequence[NDArray[np.int64]], pack_of_N: NDArray[np.int64]) -> "PackTable":
        """Members in any order, put together by their pack; in a pack they keep their order."""
        order = np.argsort(pack_of_N, kind="stable")
        counts_P = np.bincount(pack_of_N) if len(pack_of_N) else np.empty(0, dtype=np.int64)
        return _table([array[order] for array in members], counts_P)

    @staticmethod
    def joined(tables: Sequence["PackTable"]) -> "PackTable":
        """The packs of several tables, one table after the other."""
        columns = zip(*(table.members for table in tables), strict=True)
        counts = np.concatenate([np.diff(table.bounds_P) for table in tables])
        return _table([np.concatenate(column) for column in columns], counts)

    def take(self, packs_P: NDArray[np.int64]) -> "PackTable":
        """Some of the packs, in the order asked for."""
        counts_P = np.diff(self.bounds_P)[packs_P]
        shift_P = self.bounds_P[packs_P] - (np.cumsum(counts_P) - counts_P)
        at_N = np.repeat(shift_P, counts_P) + np.arange(counts_P.sum())
        return _table([array[at_N] for array in self.members], counts_P)

    def pack_of(self) -> NDArray[np.int64]:
        """The pack of each member, (N)."""
        return np.repeat(np.arange(len(self)), np.diff(self.bounds_P))

    def total(self, values_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sums over the members of each pack, (P); exact below 2^53."""
        sums_P = np.bincount(self.pack_of(), weights=values_N, minlength=len(self))
        return sums_P.astype(np.int64)


def _table(members: Sequence[NDArray[np.int64]], counts_P: NDArray[np.int64]) -> PackTable:
    """A table from its columns and the number of members of each pack."""
    source_N, draw_N, index_N, epoch_N, length_N, tiles_N = members
    bounds_P = np.concatenate([[0], np.cumsum(counts_P)]).astype(np.int64)
    return PackTable(source_N, draw_N, index_N, epoch_N, length_N, tiles_N, bounds_P)
