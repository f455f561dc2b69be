"""What a pack costs to train on, from three numbers of it: a linear form of `pack_flops`.

What: model FLOPs a token, a tile and a squared document token, for one model and sequence length.
Why: the planner weighs millions of packs to let equally heavy ones meet, and cannot count each.
What it refuses (ValueError): what `pack_flops` refuses. What it costs: four counts; no torch.

The form is exact for packs with at least one tile. Where only parts before the decoder learn, a
pack without tiles costs less than it says: nothing is passed back through the decoder. Recompute is
left out, so that switching it on in the middle of a stage does not change the order of its packs.
A whole image (`data.tiling` native) counts as the tiles that have as many patches; what its longer
attention costs beyond theirs is left out: 13 % of a pack of whole images at the 12B's sizes, give
or take 1.7 % from pack to pack, which is what the order of packs is off by.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.flops import pack_flops

Count = TypeVar("Count", int, NDArray[np.int64])


@dataclass(frozen=True)
class PackCost:
    """FLOPs, forward and backward, a unit of each. Exact integers: equal on every machine."""

    per_token: int
    per_tile: int
    per_square: int

    def of(self, tokens: Count, tiles: Count, squares: Count) -> Count:
        """FLOPs of packs.

        Args:
            tokens: padding included.
            tiles: of all images.
            squares: sum over documents of their squared lengths, padding at the end included.
        """
        return self.per_token * tokens + self.per_tile * tiles + self.per_square * squares


def pack_cost(
    model: ModelConfig, *, sequence_length: int, tile_size: int, trainable: set[str]
) -> PackCost:
    """The linear form for packs of `sequence_length` tokens. See `pack_flops` for the arguments."""
    edge = tile_size // model.encoder.patch_size

    def flops(tiles: int, documents: tuple[int, ...] = ()) -> int:
        return pack_flops(
            model,
            document_lengths=documents,
            padded_length=sequence_length,
            grids=[(edge, edge)] * tiles,
            trainable=trainable,
        ).total

    one, two = flops(1), flops(2)
    square = flops(1, (sequence_length,)) - one
    return PackCost(
        per_token=(2 * one - two) // sequence_length,
        per_tile=two - one,
        per_square=square // sequence_length**2,
    )
