"""How context ranks share visual units, and which patches make one embedding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from megatron_vl.sequence.units import pixel_shuffle_index, share_units, unit_runs
from megatron_vl.sequence.visual import PatchGrid

TILE = PatchGrid(4, 4)


def test_equal_tiles_fall_evenly() -> None:
    assert unit_runs([TILE] * 8, 4) == [(0, 2), (2, 4), (4, 6), (6, 8)]
    assert unit_runs([TILE] * 5, 2) == [(0, 2), (2, 5)]


def test_large_units_weigh_more() -> None:
    """100 patches against five of 16."""
    assert unit_runs([PatchGrid(10, 10), *[TILE] * 5], 2) == [(0, 1), (1, 6)]


def test_shares_of_a_pack() -> None:
    """Of three ranks with two tiles the middle one encodes a blank tile."""
    grids = [TILE, PatchGrid(2, 3)]
    shares = [share_units(grids, 2, rank) for rank in range(2)]
    assert [share.grids for share in shares] == [(TILE,), (PatchGrid(2, 3),)]
    assert shares[1].gathered_rows_V.tolist() == [0, 1, 2, 3, 4, 5]
    shares = [share_units([TILE, TILE], 3, rank) for rank in range(3)]
    assert [(share.first_patch, share.num_patches) for share in shares] == [
        (0, 16),
        (16, 0),
        (16, 16),
    ]
    assert {share.padded_tokens for share in shares} == {4}
    assert shares[0].gathered_rows_V.tolist() == [0, 1, 2, 3, 8, 9, 10, 11]


grids_strategy = st.lists(
    st.builds(PatchGrid, st.integers(1, 7), st.integers(1, 7)), min_size=1, max_size=9
)


@given(grids_strategy, st.integers(1, 5))
def test_every_embedding_is_gathered_once(grids: list[PatchGrid], size: int) -> None:
    shares = [share_units(grids, size, rank) for rank in range(size)]
    patch = row = 0
    gathered = {}
    for rank, share in enumerate(shares):
        if share.num_patches:
            assert share.first_patch == patch
            patch += share.num_patches
            tokens = sum(grid.tokens for grid in share.grids)
            gathered |= {rank * share.padded_tokens + i: row + i for i in range(tokens)}
            row += tokens
        assert sum(grid.tokens for grid in share.grids) <= share.padded_tokens
        assert (share.gathered_rows_V == shares[0].gathered_rows_V).all()
    assert patch == sum(grid.patches for grid in grids)
    assert [gathered[at] for at in shares[0].gathered_rows_V.tolist()] == list(range(row))
    heaviest = max(share.num_patches for share in shares)
    assert heaviest <= patch / size + max(grid.patches for grid in grids)


def test_pixel_shuffle_of_an_even_and_an_odd_grid() -> None:
    assert pixel_shuffle_index([PatchGrid(2, 4)]).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    both = pixel_shuffle_index([PatchGrid(2, 2), PatchGrid(3, 3)])
    beyond = 13
    assert both.tolist() == [
        [0, 1, 2, 3],
        [4, 5, 7, 8],
        [6, beyond, 9, beyond],
        [10, 11, beyond, beyond],
        [12, beyond, beyond, beyond],
    ]


@given(grids_strategy)
def test_every_patch_goes_to_one_embedding(grids: list[PatchGrid]) -> None:
    index = pixel_shuffle_index(grids)
    patches = sum(grid.patches for grid in grids)
    assert index.shape == (sum(grid.tokens for grid in grids), 4)
    inside = index[index < patches]
    assert np.sort(inside).tolist() == list(range(patches))
    assert (index[:, 0] < patches).all()
