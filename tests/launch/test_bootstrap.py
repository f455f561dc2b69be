"""Making the environment: when it is current, and what is refused before a download."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import bootstrap

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name in bootstrap.INPUTS:
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    return tmp_path


def test_the_stamp_follows_every_input(checkout: Path) -> None:
    stamp = checkout / ".venv" / bootstrap.STAMP
    assert not bootstrap.is_current(checkout)
    for name in bootstrap.INPUTS:
        stamp.write_text(bootstrap.fingerprint(checkout))
        assert bootstrap.is_current(checkout)
        with (checkout / name).open("a") as file:
            file.write("\n# changed\n")
        assert not bootstrap.is_current(checkout)


def test_cuda_packages_are_recognised_in_a_pip_report() -> None:
    def report(*names: str) -> dict:
        return {"install": [{"metadata": {"name": name}} for name in names]}

    assert bootstrap.cuda_packages(report("torch", "sympy", "filelock")) == []
    assert bootstrap.cuda_packages(report("torch", "nvidia-cublas", "triton")) == [
        "nvidia-cublas",
        "triton",
    ]


def test_a_cuda_build_is_refused_where_no_gpu_is(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = '{"install": [{"metadata": {"name": "nvidia-cudnn-cu13"}}]}'
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, answer, "")
    )
    with pytest.raises(bootstrap.SetupError, match="make setup TORCH_INDEX_URL=https://"):
        bootstrap._refuse_cuda_build(["pip"])


def test_a_python_without_venv_names_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 1, "no ensurepip", "")
    )
    with pytest.raises(bootstrap.SetupError, match="apt-get install python3-venv"):
        bootstrap._make_venv(tmp_path / ".venv")


def test_constraints_pin_one_plain_version_of_everything() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[0] != "#"]
    names = [line.partition("==")[0].lower() for line in lines]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    assert len(set(names)) == len(names)
    assert bootstrap.TORCH in lines
    assert {"apex", "torchvision"}.isdisjoint(names)
    setup = (ROOT / "setup.py").read_text()
    direct = re.findall(r'^        "([a-z0-9-]+)', setup, re.MULTILINE)
    assert len(direct) > 10
    assert set(direct) <= set(names)


def test_pip_s_progress_is_told_and_its_failure_raised(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bootstrap, "PROGRESS_SECONDS", 0.0)
    script = (
        "print('Collecting a'); print('Collecting b'); print('Installing collected packages: a')"
    )
    bootstrap._pip([sys.executable, "-c", script])
    assert "setup: 2 packages, unpacking" in capsys.readouterr().out
    with pytest.raises(bootstrap.SetupError, match="pip failed"):
        bootstrap._pip([sys.executable, "-c", "raise SystemExit(3)"])
