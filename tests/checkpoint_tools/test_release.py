"""`mvl checkpoint release` and the commands of docs/release.md, on a model that keeps bounds."""

import json
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from checkpoint_tools.certificate import run
from checkpoint_tools.certificate.check import Bounds
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.quantized_layout import Calibration
from checkpoint_tools.release import ReleaseOptions, release
from checkpoint_tools.stage_source import open_stage
from launch import exit_codes
from launch.cli import main
from tests.checkpoint_tools.conftest import quiet
from tests.conftest import REPOSITORY

GUIDE = REPOSITORY / "docs" / "release.md"
PASSING = {"format": None, "layout": None, "checks": [], "not_run": {}, "figures": {}}
FAILING = {"name": "kl", "passed": False, "measured": 0.5, "bound": 0.02, "says": "it diverges"}


def commands() -> list[list[str]]:
    """The commands of the guide, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", GUIDE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture(scope="module")
def workplace(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the guide's run lies at its place."""
    base = tmp_path_factory.mktemp("guide")
    (base / "runs").mkdir()
    shutil.copytree(served, base / "runs" / "demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        yield base


@pytest.mark.slow
def test_the_guide_runs_as_written(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = []
    for words in commands():
        assert words[0] == "mvl"
        assert main(words[1:]) == exit_codes.OK, words
        said.append(capsys.readouterr().out)
    for form in ("bf16", "fp8", "nvfp4"):
        made = json.loads((workplace / "releases" / "demo" / form / "certificate.json").read_text())
        assert made["passed"]
        assert made["format"] == form
        assert made["changed_bounds"] == {}
        checks = {check["name"]: check for check in made["checks"]}
        assert all(check["passed"] for check in checks.values())
        assert checks["greedy_video"]["measured"] == "32 of 32 tokens equal"
        assert made["figures"]["prompts"]["held_out"] == 25
        assert sum(made["figures"]["prompts"][kind] for kind in ("text", "image", "images")) < 50
        assert ("kl" in checks) == (form != "bf16")
        assert len(made["figures"]["layers"]) == 2 + 1 + 8
        assert made["checkpoint"]["receipt"]["reason"].startswith("mvl checkpoint import")
        assert "too small or too little trained" in made["note"]
        page = (workplace / "releases" / "demo" / form / "certificate.html").read_text()
        assert "<span class=passed>passed</span></h1>" in page
        assert "greedy_video" in page
    assert {p.name for p in (workplace / "releases" / "demo").iterdir()} == {
        "amax", "bf16", "fp8", "nvfp4"
    }  # fmt: skip


def test_one_certificate_from_the_command_line(
    served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """BF16 passes in a process of its own; then a changed picture mean is found."""
    out = tmp_path / "out"
    few = ["--bound", "prompts=8", "--bound", "new_tokens=4"]
    assert main(["checkpoint", "release", str(out), "--bf16", str(served), *few]) == exit_codes.OK
    certificate = json.loads((out / "bf16" / "certificate.json").read_text())
    assert certificate["passed"]
    assert certificate["changed_bounds"] == {"prompts": [50, 8], "new_tokens": [32, 4]}
    assert "prompts: 8 in place of 50" in (out / "bf16" / "certificate.html").read_text()
    names = [check["name"] for check in certificate["checks"]]
    assert names[-1] == "no_network"
    assert {"layers", "logits", "greedy_text", "greedy_image", "image_matters"} < set(names)
    capsys.readouterr()
    settings = out / "bf16" / "preprocessor_config.json"
    settings.write_text(settings.read_text().replace("0.48145466", "0.5"))
    words = ["checkpoint", "certify", str(out / "bf16"), "--against", str(served), *few]
    assert main(words) == exit_codes.FOUND
    said = capsys.readouterr().out
    assert "FAILED" in said
    assert "processor_files: preprocessor_config.json is not what the checkpoint" in said
    assert "prompt_pixels: prompt " in said
    assert "layers: the first diverging layer is encoder layer 0" in said
    assert "config: " not in said


def _worker(monkeypatch: pytest.MonkeyPatch, *checks: dict[str, Any]) -> list[dict[str, Any]]:
    """Put a result in the place of the certificate's process; its requests."""
    requests = []

    def answer(request: dict[str, Any], report: object) -> dict[str, Any]:
        requests.append(request)
        config = json.loads((Path(request["folder"]) / "config.json").read_text())
        said = config.get("quantization_config")
        kind = {"format": said["quant_algo"].lower(), "layout": "modelopt"} if said else {}
        passed = all(check["passed"] for check in checks)
        whole = {**PASSING, "format": "bf16", **kind, "checks": list(checks), "passed": passed}
        return json.loads(json.dumps(whole))

    monkeypatch.setattr(run, "_in_fresh_process", answer)
    return requests


def test_what_is_certified_stays_and_calibration_is_done_once(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = _worker(monkeypatch)
    out, said = tmp_path / "out", []
    options = ReleaseOptions(packs=2)
    both = {"fp8": served, "nvfp4": served}
    assert release(out, both, options, said.append) == {"fp8": [], "nvfp4": []}
    assert [Path(request["folder"]).name for request in requests] == [
        "fp8.uncertified", "nvfp4.uncertified"
    ]  # fmt: skip
    assert len([line for line in said if line.startswith("calibration: 2 of 2")]) == 1
    (amax,) = (out / "amax").iterdir()
    assert Calibration.read(amax).digest == open_stage(served).digest
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert release(out, {**both, "bf16": served}, options, quiet) == {
        "bf16": [], "fp8": [], "nvfp4": []
    }  # fmt: skip
    assert len(requests) == 3
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path != out)
    with pytest.raises(ConversionError, match=r"is another release.*\n  "):
        release(out, both, ReleaseOptions(packs=2, bounds=Bounds(kl_fp8=0.5)), quiet)


def test_nothing_takes_its_place_without_a_passing_certificate(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    _worker(monkeypatch, FAILING)
    out = tmp_path / "out"
    words = ["checkpoint", "release", str(out), "--bf16", str(served)]
    assert main(words) == exit_codes.FOUND
    assert "kl: it diverges (bound 0.02)" in capsys.readouterr().out
    assert [path.name for path in out.iterdir()] == ["bf16.failed"]
    kept = json.loads((out / "bf16.failed" / "certificate.json").read_text())
    assert not kept["passed"]
    _worker(monkeypatch)
    assert main(words) == exit_codes.OK
    assert [path.name for path in out.iterdir()] == ["bf16"]


def test_a_process_that_dies_is_a_failed_check(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.sys, "executable", "/bin/false")
    out = tmp_path / "out"
    failed = release(out, {"bf16": served}, ReleaseOptions(), quiet)
    assert "process: the process ended with 1" in failed["bf16"][0]
    assert [path.name for path in out.iterdir()] == ["bf16.failed"]


def test_a_user_is_told(served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    for words, message in (
        (["release", out], "nothing to release: name a checkpoint for bf16 or fp8 or nvfp4"),
        (["release", out, "--bf16", str(served), "--bound", "kl=3"], "nearest valid: kl_fp8"),
        (["certify", str(tmp_path), "--against", str(served)], "is no release"),
        (["calibrate", str(served), out, "--packs", "0"], "over 0 packs; the least is 1"),
    ):
        assert main(["checkpoint", *words]) == exit_codes.USAGE
        assert message in capsys.readouterr().err
