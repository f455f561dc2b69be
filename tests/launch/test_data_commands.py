"""`mvl data`: every command of docs/data.md runs, and says what a person and a program need."""

import json
import re
import shlex
import shutil
import time
from argparse import ArgumentTypeError
from pathlib import Path

import pytest

from launch.cli import main
from launch.data_arguments import FORMATS, size_in_bytes
from launch.progress import Meter
from megatron_vl.data.convert.formats import FORMATS as READERS
from tests.conftest import LAPTOP, REPOSITORY, SmallData
from tests.data.convert.replicas import Replica, build

DOCUMENT = (REPOSITORY / "docs" / "data.md").read_text()


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Replica]:
    """Small replicas, where the document's commands look for theirs."""
    folder = tmp_path_factory.mktemp("sets")
    return {name: build(name, folder / name, rows=240) for name in ("llava", "nemotron-v2")}


def documented() -> list[list[str]]:
    (block,) = re.findall(r"^```sh\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
    return [shlex.split(line) for line in block.splitlines()]


@pytest.mark.parametrize("words", documented(), ids=" ".join)
def test_documented_commands(
    words: list[str], sets: dict[str, Replica], small_data: SmallData, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert words.pop(0) == "mvl"
    places = {
        "sets/llava/train.json": sets["llava"].source / "train.json",
        "sets/llava/images": sets["llava"].media_root,
        "sets/v2/subset": sets["nemotron-v2"].source,
        "data/mine": tmp_path,
        "data/laptop": small_data.root,
        "stages/laptop": LAPTOP,
        "qa.html": tmp_path / "qa.html",
    }
    for name, place in places.items():
        words = [word.replace(name, str(place)) for word in words]
    if words[1] == "prepare":
        shutil.copytree(small_data.root / "ocr", tmp_path / "shards")
        shutil.rmtree(tmp_path / "shards" / ".nv-meta")
    if words[1] in ("stats", "bench") and words[2].endswith(".yaml"):
        words.append(small_data.override)
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


def test_the_document_names_every_format() -> None:
    assert set(FORMATS) == set(READERS)
    assert re.findall(r"^\| `(\w[\w-]*)` \|", DOCUMENT, re.MULTILINE) == list(FORMATS)


def test_convert_says_what_was_dropped(
    sets: dict[str, Replica], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    replica = sets["llava"]
    words = ["data", "convert", "--from", "llava", str(replica.source), "--out"]
    words += [str(tmp_path / "out"), "--media-root", str(replica.media_root)]
    assert main(words) == 2
    error = capsys.readouterr().err
    first = min(replica.faults)
    assert f"row {first}" in error
    assert replica.faults[first] in error
    assert main([*words, "--skip-missing"]) == 2
    assert "go on with --resume" in capsys.readouterr().err
    assert main([*words, "--skip-missing", "--resume", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["dropped"] == len(replica.faults)
    assert main([*words, "--skip-missing"]) == 0
    text = capsys.readouterr().out
    for entry in report["by_reason"]:
        numbers = ", ".join(str(row) for _, row in entry["rows"][:6])
        assert re.search(rf"dropped: {entry['reason']} +{numbers}.* {entry['count']}\n", text)
    assert f"{len(replica.kept)} of 240 rows kept" in text


def test_convert_refuses_what_argparse_can_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--from", "llama"], ["--shard-size", "2XB"], ["--strict", "--skip-missing"]):
        with pytest.raises(SystemExit) as caught:
            main(["data", "convert", "SRC", "--out", str(tmp_path), *words])
        assert caught.value.code == 2
        assert words[-1] in capsys.readouterr().err


def test_sizes() -> None:
    assert [size_in_bytes(text) for text in ("2GB", "1.5mb", "10 KB", "77", "5B")] == [
        2_000_000_000, 1_500_000, 10_000, 77, 5,
    ]  # fmt: skip
    for text in ("", "GB", "-1GB", "0", "2 TB"):
        with pytest.raises(ArgumentTypeError):
            size_in_bytes(text)


def test_validate_ends_with_its_own_code(
    small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small_data.root / "ocr", tmp_path / "ocr")
    assert main(["data", "validate", str(tmp_path / "ocr")]) == 0
    shard = tmp_path / "ocr" / "train-000.tar"
    whole = bytearray(shard.read_bytes())
    place = whole.index(b"IHDR")
    whole[place : place + 4] = b"XXXX"
    shard.write_bytes(whole)
    capsys.readouterr()
    assert main(["data", "validate", str(tmp_path / "ocr"), "--json"]) == 7
    found = json.loads(capsys.readouterr().out)
    assert len(found["findings"]) == 1
    assert found["findings"][0]["reason"] == "unreadable medium"
    assert found["findings"][0]["key"].startswith("ocr_train_")
    assert main(["data", "validate", str(tmp_path / "ocr")]) == 7
    assert "1 findings" in capsys.readouterr().out
    assert main(["data", "validate", str(tmp_path)]) == 7
    assert main(["data", "validate", str(tmp_path / "nowhere")]) == 2


def test_json_of_stats_and_bench(small_data: SmallData, capsys: pytest.CaptureFixture[str]) -> None:
    stage = str(LAPTOP / "stage1.yaml")
    assert main(["data", "stats", stage, small_data.override, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["plan"]["fill"] > 0.8
    qa = str(small_data.root / "qa")
    assert main(["data", "bench", qa, "--stage", stage, "--seconds", "0.1", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["sources"]
    assert entry["samples"] > 0


def test_inspect_by_key(
    small_data: SmallData, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "page.html"
    words = ["data", "inspect", str(small_data.root / "qa"), "--out", str(out)]
    words += ["--stage", str(LAPTOP / "stage1.yaml")]
    assert main([*words, "--key", "qa_val_000001", "--key", "qa_train_000002"]) == 0
    page = out.read_text()
    assert re.findall(r'<article id="(\w+)">', page) == ["qa_train_000002", "qa_val_000001"]
    assert "http" not in page
    assert main([*words, "--key", "qa_train_999999"]) == 2
    assert "has no sample qa_train_999999" in capsys.readouterr().err


def test_progress_speaks_when_it_takes_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.monotonic()
    monkeypatch.setattr("launch.progress.time.monotonic", lambda: now)
    with Meter(live=False) as meter:
        meter("counting", 1, 100)
        assert capsys.readouterr().err == ""
        now += 6
        meter("counting", 25, 100)
        assert capsys.readouterr().err == "counting: 25/100, 18 s left\n"
        meter("counting", 26, 100)
        now += 6
        meter("waiting", 0, 0)
        assert capsys.readouterr().err == "waiting\n"
    with Meter(live=True) as meter:
        meter("counting", 3, 0)
        meter("drawing", 1, 2)
