"""A world of one rank inside the test process, and what the tests of the trainer share."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import megatron_vl.engine  # noqa: F401
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.engine import process_groups
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train import jobs

QUICK = ["parallel.data=1", "train.global_batch=2", "data.sequence_length=256"]
MakeConfig = Callable[..., StageConfig]


@pytest.fixture
def world() -> Iterator[None]:
    """Joined, no layout made yet; `process_groups.destroy` makes room for another.

    One thread, as the laptop's ranks have.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        process_groups.join_world(rank=0, size=1, init_method=f"file://{folder}/world")
        try:
            yield
        finally:
            process_groups.leave_world()
            torch.set_num_threads(threads)


@pytest.fixture
def stage(small_data: SmallData) -> MakeConfig:
    """Makes the config of a laptop stage for one rank: `stage("stage1", "key=value", ...)`.

    Half the recipe's sequence length and a quarter of its batch, to be quick.
    """

    def make(name: str, *overrides: str) -> StageConfig:
        common = [small_data.override, *QUICK]
        return load_stage(LAPTOP / f"{name}.yaml", [*common, *overrides])

    return make


@pytest.fixture(scope="session")
def checkpoint(
    ranks: RankPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Stage 1 after two steps on one rank, optimizer state included."""
    folder = tmp_path_factory.mktemp("trained") / "step_000002"
    overrides = [small_data.override, *QUICK]
    ranks.run(1, jobs.train_and_save, LAPTOP / "stage1.yaml", overrides, 2, folder)
    return folder
