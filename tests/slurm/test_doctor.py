"""The look at a job's nodes: a sick one is named and left out, what all lack is a person's."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import exit_codes
from launch.causes import Cause
from launch.cli import main
from launch.slurm import queue
from launch.slurm.examine import FOLDER, NodeReport
from launch.slurm.verdict import NODES, verdict
from tests.slurm.chains import FakeChain

MakeChain = Callable[..., FakeChain]
PLAIN = {"python": "3.11.7", "torch": "2.13"}
NVIDIA_SMI = """#!/bin/sh
# Two GPUs; on SICK the second has memory errors.
errors=0
case " SICK " in *" $SLURMD_NODENAME "*) errors=12 ;; esac
echo "0, A GPU, 81559, 40, 0, No"
echo "1, A GPU, 81559, 41, $errors, No"
"""


def site(folder: Path, sick: str) -> dict[str, Any]:
    """A site whose nodes have two GPUs, with a driver that reports memory errors on some."""
    (folder / "bin").mkdir()
    program = folder / "bin" / "nvidia-smi"
    program.write_text(NVIDIA_SMI.replace("SICK", sick))
    program.chmod(0o755)
    return {
        "nodes": {"tasks": 2, "gpus": 2},
        "doctor": {"enabled": True, "all_reduce": False, "least_disk_gb": 0.001},
        "environment": {"setup": [f"PATH={folder}/bin:$PATH"]},
    }


@pytest.mark.distributed
def test_a_sick_node_is_named_and_the_job_starts_again_without_it(
    make_chain: MakeChain, tmp_path: Path
) -> None:
    made = make_chain(site=site(tmp_path, "127.0.0.11"))
    made.send()
    made.wait_over()
    made.assert_as_undisturbed()
    made.assert_causes("init", ["node_lost", None])
    events = [event for event in made.events() if event["stage"] == "init"]
    found, after = [event["sick"] for event in events if event["event"] == "examined"]
    assert found == {"127.0.0.11": "GPU 1 (A GPU) has 12 uncorrected memory errors"}
    assert after == {}
    starts = [event["nodes"] for event in events if event["event"] == "started"]
    assert starts == ["127.0.0.11", "127.0.0.12"]
    first = made.run.stage("init").attempt_path(1)
    assert "sick nodes: 127.0.0.11: GPU 1" in (first / "receipt.json").read_text()
    assert not list(first.glob("rank_*.log"))
    made.run.stage("stage0").receipt_path.unlink()
    made.send("stage0")
    script = (made.run.stage("stage0").path / "job.sh").read_text()
    assert "#SBATCH --exclude=127.0.0.11\n" in script
    queue.cancel([made.job("stage0").id])


@pytest.mark.distributed
def test_what_all_nodes_lack_holds_the_stage(make_chain: MakeChain) -> None:
    doctor = {"enabled": True, "all_reduce": False, "least_disk_gb": 1e9}
    made = make_chain(site={"doctor": doctor})
    made.send("init")
    made.wait_over()
    made.assert_causes("init", ["bad_config"])
    receipt = made.receipt("init")
    assert receipt.status == "held"
    assert "1 of 1 nodes are not fit, so it is the site's setup" in receipt.reason
    assert "GB are free in the run folder" in receipt.reason


def write(attempt: Path, reports: list[NodeReport], nodes: list[str]) -> Path:
    (attempt / FOLDER).mkdir(parents=True)
    (attempt / NODES).write_text("\n".join(nodes) + "\n")
    for report in reports:
        path = attempt / FOLDER / f"{report.rank}.json"
        path.write_text(json.dumps(vars(report)))
        if not report.slow:
            path.with_suffix(".well").touch()
    return attempt


def reports(count: int, **fields: Any) -> list[NodeReport]:
    return [NodeReport(f"n{rank}", rank, dict(PLAIN), **fields) for rank in range(count)]


def test_a_silent_node_and_one_of_other_versions_are_named(tmp_path: Path) -> None:
    nodes = [f"n{index}" for index in range(4)]
    found = reports(3)
    found[1].versions["torch"] = "2.12"
    told = verdict(write(tmp_path, found, nodes))
    assert told is not None
    assert told.cause is Cause.node_lost
    assert told.sick == {
        "n3": "no process of the job's first step spoke there",
        "n1": "has other versions: torch 2.12 (others 2.13)",
    }


def test_a_slow_all_reduce_blames_no_node(tmp_path: Path) -> None:
    told = verdict(
        write(tmp_path, reports(2, all_reduce_gb_s=0.5, slow="runs at 0.50 GB/s"), ["n0", "n1"])
    )
    assert told is not None
    assert (told.cause, told.sick, told.all_reduce_gb_s) == (Cause.node_lost, {}, 0.5)


def test_a_failed_all_reduce_between_well_nodes_blames_none(tmp_path: Path) -> None:
    attempt = write(tmp_path, reports(2), ["n0", "n1"])
    (attempt / FOLDER / "1.well").unlink()
    told = verdict(attempt)
    assert told is not None
    assert (told.cause, told.sick) == (Cause.node_lost, {})
    assert "an all-reduce over them failed" in told.words


def test_nothing_wrong_and_nobody_looked(tmp_path: Path) -> None:
    assert verdict(tmp_path) is None
    told = verdict(write(tmp_path, reports(2, all_reduce_gb_s=9.0), ["n0", "n1"]))
    assert told is not None
    assert (told.cause, told.sick, told.all_reduce_gb_s) == (None, {}, 9.0)


@pytest.mark.distributed
@pytest.mark.slow
def test_the_all_reduce_runs_over_all_places_of_the_job(
    make_chain: MakeChain,
) -> None:
    doctor = {"enabled": True, "all_reduce": True, "least_disk_gb": 0.001}
    made = make_chain(site={"doctor": doctor})
    made.send("init")
    made.wait_over()
    (found,) = [event for event in made.events() if event["event"] == "examined"]
    assert found["all_reduce_gb_s"] > 0
    assert made.receipt("init").done


@pytest.mark.distributed
@pytest.mark.slow
def test_a_repaired_node_is_taken_in_again(make_chain: MakeChain, tmp_path: Path) -> None:
    hangs = {"init": {"2": {"step": 4, "do": "hang"}}}
    made = make_chain(site=site(tmp_path, "127.0.0.11"), faults=hangs)
    made.send("init")
    made.wait_step("init", 2)
    job = made.job("init").id
    assert "ExcNodeList=127.0.0.11 " in queue.command("scontrol", "show", "job", "--oneliner", job)
    (tmp_path / "bin" / "nvidia-smi").write_text(NVIDIA_SMI.replace("SICK", ""))
    readmit = ["nodes", "readmit", str(made.run.path), "127.0.0.11", "--reason", "GPU replaced"]
    assert main(readmit) == exit_codes.OK
    queue.command("scancel", "--batch", "--signal=USR1", job)
    made.wait("the third attempt", lambda: made.run.stage("init").last_attempt() == 3)
    assert "ExcNodeList=(null) " in queue.command("scontrol", "show", "job", "--oneliner", job)
    made.wait_over()
    assert made.receipt("init").done
    starts = [event["nodes"] for event in made.events() if event["event"] == "started"]
    assert starts == ["127.0.0.11", "127.0.0.12", "127.0.0.11"]
