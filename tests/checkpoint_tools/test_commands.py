"""`mvl checkpoint` as it is typed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import exit_codes
from launch.checkpoint_commands import size, stage_file
from launch.cli import main
from tests.checkpoint_tools.conftest import Published
from tests.checkpoint_tools.published import read_all
from tests.conftest import LAPTOP


def test_import_explain_export_diff(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage, out = str(tmp_path / "stage"), str(tmp_path / "out")
    assert main(["checkpoint", "import", str(published.folder), stage]) == exit_codes.OK
    assert main(["checkpoint", "explain", stage, "--verify"]) == exit_codes.OK
    said = capsys.readouterr()
    assert "GB/s" in said.err
    assert "mvl checkpoint import: model from random" in said.out
    assert "digest, verified:" in said.out
    words = ["checkpoint", "export", stage, out, "--shard-size", "400KB"]
    assert main(words) == exit_codes.OK
    assert len(list(Path(out).glob("*.safetensors"))) > 1
    assert {str(t.dtype) for n, t in read_all(Path(out)).items() if "mixer" in n} == {
        "torch.bfloat16"
    }
    capsys.readouterr()
    assert main(["checkpoint", "explain", out, "--json"]) == exit_codes.OK
    known = json.loads(capsys.readouterr().out)
    assert known["kind"] == "published folder"
    assert known["lineage"][0]["from"].startswith("mvl checkpoint import")
    assert known["tensors"]["parameters"].keys() == {"encoder", "projector", "decoder"}
    assert main(["checkpoint", "diff", stage, out, "--json"]) == exit_codes.OK
    found = json.loads(capsys.readouterr().out)
    assert not found["config"]
    assert not found["only_a"]
    assert all(0 < change["relative"] < 4e-3 for change in found["changes"])


def test_a_user_is_told_in_one_message(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["checkpoint", "import", str(tmp_path), str(tmp_path / "x")]) == exit_codes.USAGE
    assert "config.json cannot be read (No such file or directory)" in capsys.readouterr().err
    assert main(["checkpoint", "export", str(tmp_path), str(tmp_path / "x")]) == exit_codes.USAGE
    assert "neither a run folder" in capsys.readouterr().err
    words = ["checkpoint", "import", str(published.folder), str(published.folder)]
    assert main(words) == exit_codes.USAGE
    assert "exists already" in capsys.readouterr().err
    words = ["checkpoint", "export", str(published.folder), str(tmp_path / "x")]
    assert main(words) == exit_codes.USAGE
    assert "is a published folder, and this needs a checkpoint" in capsys.readouterr().err
    words = ["checkpoint", "explain", str(tmp_path / "absent")]
    assert main(words) == exit_codes.USAGE
    assert "is not there" in capsys.readouterr().err


def test_a_node_is_no_stage_to_be_like(
    published: Published, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["checkpoint", "import", str(published.folder), str(tmp_path / "x")]
    assert main([*words, "--like", str(LAPTOP / "init.yaml")]) == exit_codes.USAGE
    said = capsys.readouterr().err
    assert "init.yaml is a node (assemble) and no training stage; it is made like" in said
    assert "stage0.yaml" in said


@pytest.mark.parametrize("command", ["import", "assemble"])
def test_the_example_names_a_training_stage(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["checkpoint", command, "--help"])
    (named,) = re.findall(r"--like\s+(stages/\S+\.yaml)", capsys.readouterr().out)
    assert stage_file(str(LAPTOP.parents[1] / named)).is_file()


@pytest.mark.parametrize(
    ("text", "value"),
    [("500MB", 500_000_000), ("4gb", 4 * 10**9), ("1.5 G", 1_500_000_000), ("7", 7)],
)
def test_sizes(text: str, value: int) -> None:
    assert size(text) == value


@pytest.mark.parametrize("text", ["", "MB", "4XB", "-3GB", "0"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(Exception, match=r"is no size|holds nothing"):
        size(text)


def test_a_login_node_reads_the_help_without_torch() -> None:
    program = (
        "import sys\n"
        "import launch.checkpoint_commands, launch.cli\n"
        "launch.cli.build_parser()\n"
        "assert 'torch' not in sys.modules and 'checkpoint_tools' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
