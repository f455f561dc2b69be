"""A large recipe's graph at the laptop's sizes on the user's cluster."""

from pathlib import Path

import pytest

from launch import exit_codes
from launch.cli import main
from launch.rehearsal import STEPS, write_rehearsal
from launch.site import load_site
from launch.slurm.forecast import plan_jobs
from megatron_vl.config.load import load_stage
from megatron_vl.config.recipe import gate_of, load_graph
from megatron_vl.run.folder import RunFolder
from slurm.loopback.cluster import Cluster
from tests.conftest import LAPTOP, REPOSITORY, SmallData, mvl
from tests.slurm.chains import write_site

LARGE = REPOSITORY / "stages" / "nano_12b_v2_vl"


@pytest.mark.parametrize("name", ["loopback", "example-pyxis", "example-apptainer"])
def test_the_graph_is_the_large_one_and_two_nodes_hold_it(name: str, tmp_path: Path) -> None:
    site, run, large = load_site(name), RunFolder(tmp_path / "run"), load_graph(LARGE)
    small = load_graph(write_rehearsal(large, run, site))
    assert small.graph == large.graph
    kinds = {entry.name: entry.kind for entry in large.entries}
    assert {entry.name: entry.kind for entry in small.entries} == kinds
    assert small["text_stage3"].config.gate.at_least == large["text_stage3"].config.gate.at_least
    assert {gate_of(entry.config).otherwise for entry in small.entries} <= {"hold", "continue"}
    assert small["text_stage3"].config.gate.otherwise == "continue"
    sizes = load_stage(LAPTOP / "stage1.yaml").model
    for stage, _, config in small.stages:
        assert config.model == sizes
        assert config.train.steps == STEPS
        asked = large[stage].config.parallel
        assert (config.parallel.tensor > 1) == (asked.tensor > 1)
        assert (config.parallel.context > 1) == (asked.context > 1)
        assert config.parallel.sequence == asked.sequence
    jobs = plan_jobs(small, site, run)
    assert {job.shape.nodes for job in jobs if kinds[job.stage] == "train"} == {2}
    for job in jobs:
        for mark in (site.container.image, *site.container.mounts):
            assert mark in job.script


def test_it_is_for_clusters_and_for_recipes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(tmp_path / "run")
    words = ["submit", str(LARGE), "--run", run, "--rehearse"]
    assert main(words) == exit_codes.USAGE
    assert "name yours with --site" in capsys.readouterr().err
    file = str(LARGE / "stage0.yaml")
    assert main(["submit", file, *words[2:], "--site", "loopback"]) == exit_codes.USAGE
    assert "takes a recipe folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.distributed
@pytest.mark.slow
def test_a_rehearsal_runs_on_two_nodes(
    cluster: Cluster, small_data: SmallData, tmp_path: Path
) -> None:
    site = write_site(tmp_path / "site.yaml", {})
    run = RunFolder(tmp_path / "run")
    words = ["submit", str(LARGE), "--rehearse", "--run", str(run.path), "--site", str(site)]
    mvl(*words, "--until", "stage0", "--follow", small_data.override)
    receipt = run.stage("stage0").receipt()
    assert receipt is not None
    assert receipt.done
    assert receipt.step == STEPS
    nodes = [e["nodes"] for e in run.journal.read() if e["event"] == "started"]
    assert nodes == ["127.0.0.11", "127.0.0.[11-12]"]
