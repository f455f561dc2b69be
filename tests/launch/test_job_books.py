"""What a job's books make of an ending, without Slurm: its class, what follows, nodes left out.

The books ask Slurm nothing (`launch/slurm/job.py`): their two commands run here as a job's script
calls them, on logs written by hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from launch import exit_codes
from launch.cli import main
from launch.graph import Selection
from launch.slurm import nodes, queue, watch
from launch.slurm.examine import FOLDER, NodeReport
from launch.slurm.left_out import left_out
from launch.slurm.verdict import NODES
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder
from tests.launch.node_recipe import write_node_recipe
from tests.launch.test_nodes import RELEASE, finish, stage

SAID = """\
[release] nvfp4: FAILED
mvl node: certificate failed: kl, top1 of nvfp4
nvfp4: kl is 0.031, bound 0.02, top1 is 0.93, bound 0.95; all of it: PAGE
next: distil them for it
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A run on a cluster that cannot be asked, whose stages before the release are done."""
    monkeypatch.setattr(queue, "slurm_is_here", lambda: False)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    files = {"qad": stage("qad", "after: stage0"), "release": RELEASE, "check": "", "stage1": ""}
    run = RunFolder(tmp_path / "run")
    prepare(write_node_recipe(tmp_path / "recipe", **files), run, Selection(), "loopback")
    for name in ("init", "stage0", "qad"):
        finish(run.stage(name), name)
    return run


def begin(run: RunFolder, name: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """Open an attempt; its folder."""
    assert main(["job-begin", str(run.path), name]) == exit_codes.OK
    word, attempt, _ = capsys.readouterr().out.split()
    assert word == "start"
    return run.stage(name).attempt_path(int(attempt))


def end(run: RunFolder, folder: Path, capsys: pytest.CaptureFixture[str], code: int = 1) -> str:
    """Close it as its script does when the ranks have ended with a status; the answer."""
    if not (folder / FOLDER).exists():
        (folder / "srun.log").write_text(f"srun: error: n1: task 0: Exited with exit code {code}\n")
    stage = folder.parents[1].name.partition("_")[2]
    assert main(["job-end", str(run.path), stage, folder.name, "--slurm", "JobState=RUNNING"]) == 0
    return capsys.readouterr().out.strip()


def test_a_failed_certificate_has_its_own_class_and_is_not_tried_again(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = begin(run, "release", capsys)
    (folder / "rank_0.log").write_text(SAID)
    assert end(run, folder, capsys, exit_codes.FOUND) == "held"
    ended = run.journal.read()[-1]
    assert (ended["event"], ended["cause"]) == ("ended", "certificate_failed")
    page = (folder / "post_mortem.md").read_text()
    assert "release, attempt 1: certificate_failed" in page
    assert "never tried again" in page
    assert f"Then: `mvl submit {run.plan()['recipe']} --run {run.path}" in page
    main(["status", str(run.path)])
    shown = capsys.readouterr().out
    assert "certificate failed: kl, top1 of nvfp4" in shown
    assert "next: distil them for it" in shown


def test_status_names_the_submission_that_reads_the_changed_recipe(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = begin(run, "release", capsys)
    (folder / "rank_0.log").write_text(SAID)
    end(run, folder, capsys, exit_codes.FOUND)
    monkeypatch.setattr(watch, "views", lambda run: {})
    main(["status", str(run.path)])
    last = capsys.readouterr().out.splitlines()[-1]
    assert f"mvl submit {run.plan()['recipe']} --run {run.path} --site loopback" in last
    assert "mvl resume" not in last


@pytest.mark.parametrize("logs", [128, 0])
def test_an_ending_is_told_by_any_rank_of_many_and_without_logs(
    logs: int, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    """A rank that no list of logs holds must not end the books: nobody would hold the stage."""
    run.stage("qad").receipt_path.unlink()
    folder = begin(run, "qad", capsys)
    for rank in range(logs):
        said = "NonFiniteLossError: the loss is nan" if rank == 100 else "RuntimeError: Broken pipe"
        traceback = f"Traceback (most recent call last):\n  File x\n{said}\n"
        (folder / f"rank_{rank}.log").write_text(traceback)
    srun = "".join(f"srun: error: n1: task {rank}: Exited with exit code 1\n" for rank in (100, 7))
    (folder / "srun.log").write_text(srun)
    words = ["job-end", str(run.path), "qad", folder.name, "--slurm", "JobState=RUNNING"]
    assert main(words) == exit_codes.OK
    assert capsys.readouterr().out.strip() == ("held" if logs else "again")
    receipt = run.stage("qad").receipt()
    assert receipt is not None
    assert ("not_finite: rank 100" if logs else "crashed: rank 100") in receipt.reason


def look(folder: Path, sick: dict[str, str], well: list[str]) -> None:
    """What the first step of a job leaves: the sick nodes, and the well ones."""
    (folder / FOLDER).mkdir()
    (folder / NODES).write_text("\n".join([*sick, *well]) + "\n")
    for rank, node in enumerate([*sick, *well]):
        broken = [sick[node]] if node in sick else []
        report = vars(NodeReport(node, rank, {"python": "3.11"}, broken=broken))
        (folder / FOLDER / f"{rank}.json").write_text(json.dumps(report))


def told(run: RunFolder, *words: str) -> int:
    return main(["nodes", words[0], str(run.path), *words[1:]])


def test_a_sick_node_is_left_out_until_a_person_takes_it_in(
    run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.stage("qad").receipt_path.unlink()
    folder = begin(run, "qad", capsys)
    look(folder, {"n2": "GPU 1 has 12 errors"}, ["n1", "n3"])
    assert end(run, folder, capsys) == "again n2"
    assert told(run, "list") == exit_codes.OK
    shown = capsys.readouterr().out
    assert "n2" in shown
    assert "GPU 1 has 12 errors" in shown
    assert f"mvl nodes readmit {run.path} n2 --reason WHY" in shown
    main(["status", str(run.path)])
    assert "leaves out n2 since" in capsys.readouterr().out
    assert told(run, "readmit", "n2", "--reason", "GPU replaced") == exit_codes.OK
    main(["status", str(run.path)])
    assert "leaves out" not in capsys.readouterr().out
    capsys.readouterr()
    (event,) = [event for event in run.journal.read() if event["event"] == "readmitted"]
    assert (event["nodes"], event["why"]) == (["n2"], "GPU replaced")
    assert event["who"]
    folder = begin(run, "qad", capsys)
    look(folder, {}, ["n1", "n2", "n3"])
    assert end(run, folder, capsys) == "again -", "the job's own list is emptied"
    folder = begin(run, "qad", capsys)
    look(folder, {"n2": "GPU 1 has 3 errors"}, ["n1", "n3"])
    assert end(run, folder, capsys).endswith(" n2"), "readmitted too early, it is put aside again"
    told(run, "list", "--json")
    listed = json.loads(capsys.readouterr().out)
    assert [one["why"] for one in listed["left_out"]] == ["GPU 1 has 3 errors"]


def test_a_person_leaves_a_node_out(
    run: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes.queue, "command", lambda *words: "n1\nn2\nnode17\nn1")
    assert told(run, "exclude", "n2", "--reason", "slow fan") == exit_codes.OK
    assert left_out(run.journal.read())["n2"].why == "slow fan"
    capsys.readouterr()
    assert told(run, "exclude", "node71", "--reason", "x") == exit_codes.USAGE
    assert "nearest valid: node17" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["readmit", "n9", "--reason", "x"], "this run does not leave it out; it leaves out n2"),
        (["readmit", "n2", "--reason", " "], "--reason is empty"),
        (["readmit", "n5", "--reason", "x"], "the site's file that excludes it"),
    ],
)
def test_what_cannot_be_taken_in_is_refused(
    words: list[str], why: str, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    run.journal.append("examined", stage="qad", attempt=1, sick={"n2": "errors"})
    site = run.path / "site.yaml"
    site.write_text(
        site.read_text().replace("partition: batch", "partition: batch\n  exclude: [n5]")
    )
    assert told(run, *words) == exit_codes.USAGE
    assert why in capsys.readouterr().err
    assert "n2" in left_out(run.journal.read())


def test_nodes_are_a_clusters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made: dict[str, Any] = {"stages": [], "launcher": "local"}
    RunFolder(tmp_path / "run").create(made)
    assert main(["nodes", "list", str(tmp_path / "run")]) == exit_codes.USAGE
    assert "runs on this machine alone" in capsys.readouterr().err
