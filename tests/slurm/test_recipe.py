"""The laptop recipe as jobs on two virtual nodes: it learns what it learns on one machine."""

from pathlib import Path

import pytest

from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from slurm.loopback.cluster import Cluster
from tests.conftest import LAPTOP, ShortRun, SmallData, mvl
from tests.slurm.chains import write_site

pytestmark = pytest.mark.distributed
TRAINED = ("stage0", "stage1", "stage2", "stage3", "stage4")


def losses(run: RunFolder, stage: str) -> list[float]:
    return [line["loss"] for line in step_lines(read_metrics(run.stage(stage).metrics_path))]


def submit(path: Path, last: str, *settings: str) -> RunFolder:
    words = ["submit", str(LAPTOP), "--run", str(path), "--until", last, "--follow"]
    mvl(*words, *settings)
    return RunFolder(path)


def test_two_nodes_learn_what_one_process_learns(
    cluster: Cluster, short_run: ShortRun, tmp_path: Path
) -> None:
    """The first stage; torch.distributed meets at the first node's address."""
    site = write_site(tmp_path / "site.yaml", {"nodes": {"tasks": 1}})
    settings = [*short_run.overrides, "parallel.data=2", "evaluation.packs=2", "--site", str(site)]
    run = submit(tmp_path / "run", "stage0", *settings)
    receipt = run.stage("stage0").receipt()
    assert receipt is not None
    assert receipt.done
    started = [event["nodes"] for event in run.journal.read() if event["event"] == "started"]
    assert started == ["127.0.0.11", "127.0.0.[11-12]"]
    alone = losses(RunFolder(short_run.path), "stage0")
    assert losses(run, "stage0") == pytest.approx(alone, rel=1e-4)


@pytest.mark.slow
def test_the_whole_recipe_gives_on_slurm_what_it_gives_here(
    cluster: Cluster, small_data: SmallData, tmp_path: Path
) -> None:
    """init and stages 0-4 on two nodes of two ranks: every loss with all its digits."""
    settings = [
        small_data.override, "parallel.tensor=2", "parallel.data=2", "train.global_batch=2",
        "parallel.context=1", "train.steps=2", "data.sequence_length=256", "evaluation.every=0",
        "evaluation.batches=1",
        "gate.otherwise=continue",  # two steps pass no gate
    ]  # fmt: skip
    settings += ["evaluation.packs=2", "--skip", "code_stage1", "--skip", "code_stage3"]
    here = submit(tmp_path / "here", "stage4", *settings)
    site = write_site(tmp_path / "site.yaml", {})
    there = submit(tmp_path / "there", "stage4", *settings, "--site", str(site))
    for name in TRAINED:
        receipt = there.stage(name).receipt()
        assert receipt is not None
        assert receipt.done
        assert len(losses(there, name)) == 2
        assert losses(there, name) == losses(here, name)
    started = [event for event in there.journal.read() if event["event"] == "started"]
    nodes = [event["nodes"] for event in started]
    assert nodes == ["127.0.0.11", *["127.0.0.[11-12]"] * len(TRAINED)]
