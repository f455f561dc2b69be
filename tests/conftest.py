"""What the whole test run shares: one small data set, one pool of ranks."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.ranks import RankPool

REPOSITORY = Path(__file__).resolve().parents[1]
LAPTOP = REPOSITORY / "stages" / "laptop"


@dataclass(frozen=True)
class SmallData:
    """A small prepared data set of the laptop recipe, as an override of its root."""

    root: Path

    @property
    def override(self) -> str:
        return f"data.root={self.root}"


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> SmallData:
    """Every source of the laptop recipe, a few dozen samples each."""
    from megatron_vl.config.load import load_stage
    from megatron_vl.data.prepare import prepare_laptop

    root = tmp_path_factory.mktemp("small") / "laptop"
    config = load_stage(LAPTOP / "stage1.yaml", [f"data.root={root}"])
    sizes = {"captions": 60, "ocr": 60, "qa": 60, "code": 60, "text": 60, "long_text": 12}
    prepare_laptop(config.data, config.model, seed=11, sizes=sizes, progress=lambda line: None)
    return SmallData(root)


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Real gloo ranks that stay up for the whole test run."""
    pool = RankPool(4)
    yield pool
    pool.close()
