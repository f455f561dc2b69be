"""The real trainer on a real Slurm, and what only time shows. Slow: each start loads torch."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from launch.slurm import queue
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from slurm.loopback.cluster import Cluster
from tests.conftest import LAPTOP, REPOSITORY, SmallData, mvl
from tests.slurm.chains import FakeChain, write_site

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
STAGES = ("stage0", "stage1")
SITE = {"time": {"start_seconds": 20, "save_seconds": 5, "lead_seconds": 30, "limit_minutes": 30}}


def settings(small_data: SmallData, *more: str) -> list[str]:
    """Two nodes of two ranks, four steps a stage."""
    return [
        small_data.override,
        "parallel.tensor=2",
        "parallel.data=2",
        "train.global_batch=2",
        "train.steps=4",
        "data.sequence_length=256",
        "evaluation.every=0",
        "evaluation.batches=1",
        *more,
    ]


def losses(run: RunFolder) -> dict[str, list[float]]:
    return {
        name: [line["loss"] for line in step_lines(read_metrics(run.stage(name).metrics_path))]
        for name in STAGES
    }


def digests(run: RunFolder) -> dict[str, dict]:
    """Every tensor of every stage's last checkpoint."""
    from megatron_vl.train.checkpoint import full_tensors

    found = {}
    for name in STAGES:
        stage = run.stage(name)
        receipt = stage.receipt()
        assert receipt is not None
        assert receipt.done
        found[name] = full_tensors(stage.checkpoint_path(receipt))
    return found


def assert_same_weights(one: RunFolder, other: RunFolder) -> None:
    import torch

    first, second = digests(one), digests(other)
    assert first.keys() == second.keys()
    for stage, tensors in first.items():
        assert all(torch.equal(tensor, second[stage][name]) for name, tensor in tensors.items())


@pytest.fixture(scope="module")
def undisturbed(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """init, stage0 and stage1 on the local site."""
    run = RunFolder(tmp_path_factory.mktemp("local") / "run")
    words = ["submit", str(LAPTOP), "--run", str(run.path), "--until", "stage1", "--follow"]
    mvl(*words, *settings(small_data))
    return run


def test_two_nodes_of_two_ranks_give_what_the_local_site_gives(
    cluster: Cluster, small_data: SmallData, undisturbed: RunFolder, tmp_path: Path
) -> None:
    site = write_site(tmp_path / "site.yaml", SITE)
    run = RunFolder(tmp_path / "run")
    words = ["submit", str(LAPTOP), "--run", str(run.path), "--until", "stage1", "--follow"]
    said = mvl(*words, "--site", str(site), *settings(small_data)).stdout
    assert "stage1: job" in said
    assert losses(run) == losses(undisturbed)
    assert_same_weights(run, undisturbed)
    started = [event for event in run.journal.read() if event["event"] == "started"]
    nodes = [event["nodes"] for event in started]
    assert nodes == ["127.0.0.11", "127.0.0.[11-12]", "127.0.0.[11-12]"]


def test_warned_killed_and_preempted_it_gives_the_same_weights(
    cluster: Cluster, small_data: SmallData, undisturbed: RunFolder, tmp_path: Path
) -> None:
    """A warning in stage0; a node lost in stage1 after a save."""
    site = write_site(tmp_path / "site.yaml", SITE | {"requeue": {"node_lost": 5}})
    run = RunFolder(tmp_path / "run")
    words = ["submit", str(LAPTOP), "--run", str(run.path), "--until", "stage1"]
    mvl(*words, "--site", str(site), *settings(small_data, "checkpoint.every=1"))
    wait(run, lambda: saved(run, "stage0", 1))
    job = queue.jobs_by_stage(run)["stage0"][-1].id
    queue.command("scancel", "--batch", "--signal=USR1", job)
    wait(run, lambda: saved(run, "stage1", 1))
    node = "127.0.0.12"
    cluster.kill_node(node)
    try:
        wait(run, lambda: run.stage("stage1").last_attempt() >= 2)
    finally:
        cluster.revive_node(node)
    wait(run, lambda: done(run, "stage1"))
    assert_same_weights(run, undisturbed)
    causes = [e["cause"] for e in run.journal.read() if e["event"] == "ended"]
    assert causes[-1] is None
    assert "node_lost" in causes


def test_ctrl_c_on_the_local_site_saves_and_resume_goes_on(
    small_data: SmallData, undisturbed: RunFolder, tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    words = ["submit", str(LAPTOP), "--run", str(run.path), "--until", "stage1", "--follow"]
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words, *settings(small_data)],
        cwd=REPOSITORY,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait(run, lambda: run.exists() and losses(run)["stage0"])
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=120)
    receipt = run.stage("stage0").receipt()
    assert receipt is not None
    assert receipt.status == "incomplete"
    assert "asked to stop (SIGTERM" in receipt.reason
    mvl("resume", str(run.path), "--follow")
    assert_same_weights(run, undisturbed)


def test_a_real_time_limit_warns_saves_and_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """Slurm's shortest limit is a minute; it warns up to a minute early."""
    site = {"time": {"limit_minutes": 1, "lead_seconds": 20, "save_seconds": 1, "start_seconds": 1}}
    chain = FakeChain(cluster, tmp_path / "chain", steps=120, pace=0.5, site=site)
    try:
        chain.send("init")
        chain.wait("a second attempt", lambda: chain.run.stage("init").last_attempt() == 2)
        chain.wait("its save", lambda: chain.saved("init") > 10)
        assert queue.jobs_by_stage(chain.run)["init"][-1].id == chain.events()[1]["job"]
        ends = [e["cause"] for e in chain.events() if e["event"] == "ended"]
        assert ends[0] == "time_limit"
        chain.assert_nothing_saved_was_trained_twice("init")
    finally:
        chain.end()


@pytest.fixture
def forgetful(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that forgets a job two seconds after its end."""
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        found = Cluster(Path(folder), nodes=2, gpus=0, min_job_age=2)
        found.up_while_alive()
        for name, value in found.variables.items():
            monkeypatch.setenv(name, value)
        try:
            yield found
        finally:
            found.down()


def test_a_failed_and_forgotten_parent_starts_nothing(
    cluster: Cluster, forgetful: Cluster, tmp_path: Path
) -> None:
    """Slurm then counts `afterok` as satisfied and runs the next job; its books say no."""
    faults = {"init": {"1": {"step": 2, "do": "nan"}}}
    chain = FakeChain(forgetful, tmp_path / "chain", faults=faults)
    try:
        sent = chain.send()
        parent = sent.new["init"]
        chain.wait("the parent's end", lambda: chain.receipt_status("init") == "held")
        chain.wait(
            "Slurm to forget it",
            lambda: all(job.id != parent for job in chain.jobs()),
            seconds=200,
        )
        # Whether or not the waiting job has been let go by now, a new one on the old id is.
        script = chain.run.stage("stage0").path / "job.sh"
        number = queue.submit_script(script, after=parent, hold=False)
        queue.cancel([sent.new["stage0"]])
        output = chain.run.stage("stage0").path / f"slurm-{number}.out"
        chain.wait("its word", lambda: output.exists() and "init done" in output.read_text())
        assert chain.run.stage("stage0").last_attempt() == 0
    finally:
        chain.end()


def saved(run: RunFolder, stage: str, step: int) -> bool:
    events = run.journal.read()
    return any(e["event"] == "saved" and e["stage"] == stage and e["step"] >= step for e in events)


def done(run: RunFolder, stage: str) -> bool:
    """Whether the job's books say so: they are closed some time after the receipt is written."""
    ended = [e for e in run.journal.read() if (e["event"], e["stage"]) == ("ended", stage)]
    return bool(ended) and ended[-1]["status"] == "done"


def wait(run: RunFolder, condition: object) -> None:
    """Until something is so: at most four minutes without a word of any rank, 20 in all."""
    assert callable(condition)
    began = moved = time.monotonic()
    news = -1
    while not condition():
        logs = run.path.glob("stages/*/attempts/*/rank_*.log")
        found = sum(path.stat().st_size for path in logs)
        if found != news:
            news, moved = found, time.monotonic()
        assert time.monotonic() < min(moved + 240, began + 1200), run.journal.read()
        time.sleep(0.1)
