"""What a machine has and lacks, told without importing it."""

import importlib.metadata
import json
import os
from pathlib import Path

import pytest

from launch import doctor, exit_codes
from launch.cli import main


def test_this_machine_has_what_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--json"]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    assert found["packages"]["torch"] == importlib.metadata.version("torch")
    assert found["problems"] == []
    assert found["all_reduce_gb_s"] is None


def test_what_is_missing_or_of_another_version_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "megatron-core":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.1" if name == "omegaconf" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(doctor, "_LEAST_DISK_GB", 1e9)
    assert main(["doctor", "--quick"]) == exit_codes.FOUND
    out = capsys.readouterr().out
    assert "problem: megatron-core is not installed: nothing trains" in out
    assert "problem: omegaconf is 0.1, tested with" in out
    assert "GB are free" in out


@pytest.mark.distributed
def test_the_all_reduce_is_measured_between_real_ranks() -> None:
    rate, problem = doctor.all_reduce()
    assert problem == ""
    assert rate is not None
    assert rate > 0


@pytest.mark.distributed
def test_a_failing_all_reduce_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "no_such_interface")
    rate, problem = doctor.all_reduce()
    assert rate is None
    assert problem.startswith("the all-reduce between two ranks failed")


ROWS = """\
0, NVIDIA H100 80GB HBM3, 81559, 41, 0, No
1, NVIDIA H100 80GB HBM3, 81559, 43, 7, Yes
2, Some GPU, [N/A], [N/A], [N/A], [N/A]
"""


@pytest.mark.parametrize(
    ("program", "gpus", "problems"),
    [
        (
            f"cat <<'END'\n{ROWS}END",
            [
                "NVIDIA H100 80GB HBM3 (86 GB, 41 C)",
                "NVIDIA H100 80GB HBM3 (86 GB, 43 C)",
                "Some GPU",
            ],
            [
                "GPU 1 (NVIDIA H100 80GB HBM3) has 7 uncorrected memory errors",
                "GPU 1 (NVIDIA H100 80GB HBM3) waits for a reset to retire memory",
            ],
        ),
        ("echo no driver; exit 9", [], ["nvidia-smi failed: no driver"]),
        (
            "echo '0, A GPU, 81559, 41, 0, No'; echo 'Unable to query GPU 1, is lost'",
            ["A GPU (86 GB, 41 C)"],
            [
                "nvidia-smi printed 1 of 2 lines that are not of 6 columns, the first is "
                "'Unable to query GPU 1, is lost'"
            ],
        ),
    ],
    ids=["three-gpus", "no-driver", "a-line-of-another-form"],
)
def test_gpus_are_named_with_what_makes_them_unfit(
    program: str,
    gpus: list[str],
    problems: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{program}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    report = doctor.examine()
    assert report.gpus == gpus
    assert report.problems == problems
