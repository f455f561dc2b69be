"""One real Slurm for all tests of this folder, and small chains to run on it."""

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.slurm import chain
from launch.snapshot import take_snapshot
from megatron_vl.run.folder import RunFolder
from slurm.loopback.cluster import Cluster
from slurm.loopback.packages import INSTALL, missing_programs
from tests.slurm.chains import FakeChain

POLICY = """
function slurm_job_submit(job, partitions, uid)
    if job.account ~= nil and job.account ~= "team" then
        slurm.log_user("account " .. job.account .. " is not yours; yours is team")
        return slurm.ERROR
    end
    if job.time_limit ~= nil and job.time_limit < 4000000000 and job.time_limit > 240 then
        slurm.log_user("time limit above 4 hours, which this site does not give")
        return slurm.ERROR
    end
    return slurm.SUCCESS
end
function slurm_job_modify(job, record, partitions, uid)
    return slurm.SUCCESS
end
"""
"""A site's own rules, as sites write them."""


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[Cluster]:
    """Four virtual nodes, one partition `batch` and one, `high`, that preempts it."""
    absent = missing_programs()
    if absent:
        pytest.skip(f"no Slurm here ({', '.join(absent)}); to get it: {INSTALL}")
    # Short, because a unix socket's path is; open, because slurmd insists.
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = Cluster(Path(folder), nodes=4, gpus=2, policy=POLICY)
        try:
            cluster.up_while_alive()
            yield cluster
        finally:
            cluster.down()


@pytest.fixture(scope="session")
def code_snapshot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One copy of the code for all chains: somebody may be editing while the tests run."""
    return take_snapshot(RunFolder(tmp_path_factory.mktemp("code")))


@pytest.fixture
def cluster(
    slurm_cluster: Cluster, code_snapshot: Path, monkeypatch: pytest.MonkeyPatch
) -> Cluster:
    """The cluster, with this process pointed at it."""
    monkeypatch.setattr(chain, "take_snapshot", lambda run: code_snapshot)
    for name in [name for name in os.environ if name.startswith(("SLURM", "SBATCH"))]:
        monkeypatch.delenv(name)
    for name, value in slurm_cluster.variables.items():
        monkeypatch.setenv(name, value)
    return slurm_cluster


@pytest.fixture
def make_chain(cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., FakeChain]]:
    """Makes chains of fake ranks, and cancels what is left of them."""
    made: list[FakeChain] = []

    def make(**settings: Any) -> FakeChain:
        made.append(FakeChain(cluster, tmp_path / f"chain{len(made)}", **settings))
        return made[-1]

    yield make
    for one in made:
        one.end()
