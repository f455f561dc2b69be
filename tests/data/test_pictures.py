"""The laptop recipe's pictures: every view shows something, and held-out views are other pixels."""

from random import Random

import numpy as np
import pytest

from megatron_vl.data.pictures import BLANK_SPREAD, draw_view


@pytest.mark.parametrize("split", ["train", "val"])
def test_no_view_is_blank(split: str) -> None:
    random = Random(5)
    for _ in range(150):
        view = draw_view(random, split, 64)
        assert np.asarray(view.image.convert("L")).std() >= BLANK_SPREAD
        assert view.colours
        assert view.image.width % 64 == 0
        assert view.image.height % 64 == 0
