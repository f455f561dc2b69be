"""The Mamba exchange between context ranks: against megatron-core's own, and over packs."""

import pytest
import torch

from tests.engine import context_jobs
from tests.support.ranks import RankPool
from tests.train.test_exact import SMALL, STAGE, overrides_of

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("layout", ["CP2", "CP4", "TP2-CP2"])
def test_one_document_is_exchanged_as_megatron_core_does(ranks: RankPool, layout: str) -> None:
    """Two groups whole on two ranks; copied to two ranks each; one group of a tensor rank copied
    to two."""
    size, wanted = overrides_of(layout)
    for equal in ranks.run(size, context_jobs.exchanged, STAGE, [*SMALL, *wanted]):
        assert all(equal.values()), equal


@pytest.mark.parametrize("layout", ["CP2", "CP4"])
def test_a_pack_mixes_as_on_one_rank(ranks: RankPool, layout: str) -> None:
    """Documents of one to forty chunks: shards put together are one rank's output."""
    size, wanted = overrides_of(layout)
    lengths = [16, 8, 40, 320, 24]
    ((expected, _),) = ranks.run(1, context_jobs.mixed, STAGE, SMALL, lengths)
    whole = torch.full_like(expected, float("nan"))
    for output, places in ranks.run(size, context_jobs.mixed, STAGE, [*SMALL, *wanted], lengths):
        whole[places] = output
    assert float((whole - expected).norm() / expected.norm()) < 2e-6
