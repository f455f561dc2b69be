"""A changed token or pixel of one document never changes another's logits in any bit, however the
pack is shared: torch kernels, float32 and bfloat16."""

import pytest

from tests.engine.isolation_jobs import changes
from tests.support.ranks import RankPool
from tests.train.test_exact import SMALL, STAGE, layouts, overrides_of

pytestmark = pytest.mark.distributed

# Data-parallel ranks hold packs of their own.
SHARING = [layout for layout in layouts() if "DP" not in layout]
QUICK = ("one", "CP2", "TP2-SP-CP2", "PP2")


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        *((layout, "fp32") for layout in SHARING),
        *((layout, "bf16") for layout in QUICK),
        *(
            pytest.param(layout, "bf16", marks=pytest.mark.slow)
            for layout in SHARING
            if layout not in QUICK
        ),
    ],
)
def test_a_change_stays_in_its_document(ranks: RankPool, layout: str, precision: str) -> None:
    size, wanted = overrides_of(layout)
    overrides = [*SMALL, "train.global_batch=1", f"precision={precision}", *wanted]
    per_rank = ranks.run(size, changes, STAGE, overrides)
    assert len({change.document for change in per_rank[0]}) >= 4
    assert {change.what for change in per_rank[0]} == {"tokens", "pixels"}
    for same in zip(*per_rank, strict=True):
        first = same[0]
        changed = frozenset[int]().union(*(change.changed for change in same))
        assert changed == {first.document}, (first.document, first.what, changed)
