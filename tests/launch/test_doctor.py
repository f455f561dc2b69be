"""What a machine has and lacks, told without importing it."""

import importlib.metadata
import json

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
