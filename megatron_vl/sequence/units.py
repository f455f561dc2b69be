"""How context-parallel ranks share the visual units of a pack, and where embeddings then lie.

Every rank encodes a contiguous run of units, about equally many patches; the projected embeddings
of all ranks are gathered, each rank's padded to the most any rank has. A rank without a unit
encodes a blank one, so that all run the same operations. `pixel_shuffle_index` says which patches
make one embedding, for grids of any shape.

Shape suffixes: U units, V visual embeddings of the pack, P patches.
Numpy integers only: no torch, no process group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_vl.sequence.counts import PIXEL_SHUFFLE
from megatron_vl.sequence.visual import PatchGrid


@dataclass(frozen=True)
class UnitShare:
    """What one context-parallel rank encodes.

    first_patch, num_patches: its run of the pack's patches; none for a rank without a unit.
    grids: its units, or one blank unit.
    padded_tokens: embeddings each rank brings to the gathering.
    gathered_rows_V: where each of the pack's embeddings lies among the gathered ones.
    """

    first_patch: int
    num_patches: int
    grids: tuple[PatchGrid, ...]
    padded_tokens: int
    gathered_rows_V: NDArray[np.int64]


def unit_runs(grids: Sequence[PatchGrid], size: int) -> list[tuple[int, int]]:
    """(first, end) unit of each of `size` ranks: contiguous, in order, balanced by patches.

    A unit goes to the rank in whose equal part of all patches its middle lies.
    """
    ends_U = np.cumsum([grid.patches for grid in grids])
    middles_U = ends_U - np.array([grid.patches for grid in grids]) / 2
    owners_U = np.minimum((middles_U * size / ends_U[-1]).astype(np.int64), size - 1)
    edges = np.searchsorted(owners_U, np.arange(size + 1)).tolist()
    return list(pairwise(edges))


def share_units(grids: Sequence[PatchGrid], size: int, rank: int) -> UnitShare:
    """One rank's part of a pack that has at least one unit."""
    runs = unit_runs(grids, size)
    counts = [sum(grid.tokens for grid in grids[first:end]) for first, end in runs]
    blank = min(grids, key=lambda grid: grid.patches)
    padded = max(max(counts), blank.tokens if 0 in counts else 0)
    first, end = runs[rank]
    return UnitShare(
        first_patch=sum(grid.patches for grid in grids[:first]),
        num_patches=sum(grid.patches for grid in grids[first:end]),
        grids=tuple(grids[first:end]) or (blank,),
        padded_tokens=padded,
        gathered_rows_V=np.concatenate(
            [owner * padded + np.arange(count) for owner, count in enumerate(counts)]
        ).astype(np.int64),
    )


def pixel_shuffle_index(grids: Sequence[PatchGrid]) -> NDArray[np.int64]:
    """The four patches of every embedding, (V, 4): upper left, upper right, lower left, lower right
    (pixel shuffle v2). Beyond an odd edge stands P, the number of patches: a row of zeros.
    """
    total = sum(grid.patches for grid in grids)
    squares: dict[PatchGrid, NDArray[np.int64]] = {}
    index = []
    first = 0
    for grid in grids:
        if grid not in squares:
            squares[grid] = _squares(grid)
        local = squares[grid]
        index.append(np.where(local < 0, total, local + first))
        first += grid.patches
    return np.concatenate(index)


def _squares(grid: PatchGrid) -> NDArray[np.int64]:
    """`pixel_shuffle_index` of one grid, -1 beyond its edge."""
    step = PIXEL_SHUFFLE
    rows, columns = -(-grid.rows // step), -(-grid.columns // step)
    padded = np.full((rows * step, columns * step), -1, dtype=np.int64)
    padded[: grid.rows, : grid.columns] = np.arange(grid.patches).reshape(grid)
    return padded.reshape(rows, step, columns, step).transpose(0, 2, 1, 3).reshape(-1, step**2)
