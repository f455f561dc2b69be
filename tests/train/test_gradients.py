"""Gradients of a global batch do not depend on which data-parallel rank holds which pack."""

import pytest

from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train.gradient_jobs import gradients

pytestmark = pytest.mark.distributed

ALL = "encoder,projector,decoder"
BATCHES = {
    "mixed": ["captions", "qa", "text", "ocr"],
    "no-images-on-the-second-rank": ["captions", "text", "ocr", "code"],
    "no-images-at-all": ["text", "code"],
}


@pytest.mark.parametrize(
    ("batch", "trainable"),
    [*((batch, ALL) for batch in BATCHES), ("no-images-on-the-second-rank", "projector")],
)
def test_two_ranks_have_the_gradients_of_one(
    ranks: RankPool, small_data: SmallData, batch: str, trainable: str
) -> None:
    common = [small_data.override, "data.sequence_length=256", f"train.trainable=[{trainable}]"]
    file, sources = LAPTOP / "stage1.yaml", BATCHES[batch]
    (alone,) = ranks.run(1, gradients, file, [*common, "parallel.data=1"], sources)
    pair = ranks.run(2, gradients, file, [*common, "parallel.data=2"], sources)
    loss, tiles, expected = alone
    assert [shown > 0 for shown in tiles] == [s not in ("text", "code") for s in sources]
    for rank, (other_loss, other_tiles, found) in enumerate(pair):
        assert other_tiles == tiles[rank::2]
        assert other_loss == pytest.approx(loss, rel=1e-6)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            error, norm = float((found[name] - gradient).norm()), float(gradient.norm())
            if batch == "no-images-at-all" and name.startswith("vision_"):
                assert error == norm == 0, name
            else:
                assert norm > 0, name
                assert error < 1e-5 * norm, name
