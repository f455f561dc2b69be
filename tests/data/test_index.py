"""The index is the one energon writes, made without decoding; broken media cost themselves only."""

import contextlib
import io
import json
import shutil
import sqlite3
import tarfile
from pathlib import Path

import pytest
from megatron.energon.epathlib import EPath
from megatron.energon.flavors import BaseWebdatasetFactory
from megatron.energon.media.extractor import MediaFilterConfig
from PIL import Image

from megatron_vl.data.index import index_source
from megatron_vl.data.store import SourceStore
from tests.data.convert.pictures import album, clip

TABLES = ("samples", "sample_parts", "media_metadata")


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two training shards and a validation shard; no turned images, which energon gets wrong."""
    folder = tmp_path / "set"
    folder.mkdir()
    upright = [
        (name.rsplit(".")[-1], data)
        for name, data in album().items()
        if Image.open(io.BytesIO(data)).getexif().get(0x0112, 1) == 1
    ]
    for number, shard in enumerate(("train-000", "train-001", "val-000")):
        files: dict[str, bytes] = {}
        for index, (suffix, data) in enumerate(upright[number * 9 : number * 9 + 9]):
            key = f"dir/{shard}_{index:02d}"
            files[f"{key}.json"] = json.dumps({"messages": [{"role": "user"}]}).encode()
            files[f"{key}.0.{suffix}"] = data
        files[f"{shard}_clip.json"] = b"{}"
        files[f"{shard}_clip.0.mp4"] = clip(number)
        files["__skipped__/x.jpg"] = b"left out by energon"
        write_tar(folder / f"{shard}.tar", files)
    return folder


def tables(folder: Path) -> dict[str, list[tuple]]:
    with contextlib.closing(sqlite3.connect(folder / ".nv-meta" / "index.sqlite")) as base:
        return {name: sorted(base.execute(f"SELECT * FROM {name}")) for name in TABLES}


def test_the_index_is_energons(source: Path, tmp_path: Path) -> None:
    other = tmp_path / "other" / "set"
    shutil.copytree(source, other)
    assert index_source(source) == []
    with contextlib.redirect_stdout(io.StringIO()):
        BaseWebdatasetFactory.prepare_dataset(
            EPath(other),
            ["train-000.tar", "train-001.tar", "val-000.tar"],
            split_parts_patterns=[("train", "train-.*"), ("val", "val-.*")],
            workers=1,
            media_filter=MediaFilterConfig.parse(glob=None, header=False, extension=True),
        )
    ours, theirs = tables(source), tables(other)
    assert ours["samples"] == theirs["samples"]
    assert ours["sample_parts"] == theirs["sample_parts"]
    assert len(ours["media_metadata"]) == len(theirs["media_metadata"]) == 30
    for mine, other_row in zip(ours["media_metadata"], theirs["media_metadata"], strict=True):
        assert mine[:2] == other_row[:2]
        assert json.loads(mine[2]) == pytest.approx(json.loads(other_row[2]))
    for name in ("train-000", "train-001", "val-000"):
        path = f"{name}.tar.idx"
        assert (source / path).read_bytes() == (other / path).read_bytes()
    info = ".nv-meta/.info.json"
    assert json.loads((source / info).read_text()) == json.loads((other / info).read_text())


def test_identity_follows_the_contents(source: Path, tmp_path: Path) -> None:
    again = tmp_path / "again" / "set"
    shutil.copytree(source, again)
    index_source(source)
    index_source(again, workers=2)
    name = ".nv-meta/index.uuid"
    assert (source / name).read_text() == (again / name).read_text()
    assert tables(source) == tables(again)
    write_tar(again / "train-001.tar", {"a.json": b"{}"})
    index_source(again)
    assert (source / name).read_text() != (again / name).read_text()
    assert not (again / ".nv-meta.old").exists()


def test_turned_images_have_their_upright_size(tmp_path: Path) -> None:
    data = next(data for name, data in album().items() if "p10" in name)
    with Image.open(io.BytesIO(data)) as image:
        width, height = image.size
        assert image.getexif()[0x0112] == 6
    write_tar(tmp_path / "train-000.tar", {"a.json": b"{}", "a.0.jpg": data})
    index_source(tmp_path)
    (row,) = tables(tmp_path)["media_metadata"]
    fields = json.loads(row[2])
    assert (fields["width"], fields["height"]) == (height, width)


def test_broken_media_cost_only_themselves(source: Path) -> None:
    good = next(data for name, data in album().items() if name.endswith("jpg"))
    files = {
        "a.json": b"{}", "a.0.jpg": good[: len(good) // 2], "a.1.jpg": good,
        "b.json": b"{}", "b.0.jpg": b"", "b.1.mp4": clip(1)[:-300],
        "c.json": b"{}", "c.0.jpg": good,
    }  # fmt: skip
    write_tar(source / "train-001.tar", files)
    whole = (source / "train-001.tar").read_bytes()
    (source / "train-001.tar").write_bytes(whole[: whole.rindex(b"c.0.jpg") + 700])
    problems = index_source(source)
    assert {(found.shard, found.member) for found in problems} == {
        ("train-001.tar", ""),
        ("train-001.tar", "a.0.jpg"),
        ("train-001.tar", "b.0.jpg"),
        ("train-001.tar", "b.1.mp4"),
        ("train-001.tar", "c.0.jpg"),
    }
    known = {row[0] for row in tables(source)["media_metadata"]}
    assert "a.1.jpg" in known
    assert not known & {"a.0.jpg", "b.0.jpg", "b.1.mp4", "c.0.jpg"}
    store = SourceStore(source.parent, "set", "train")
    assert store._read("a.1.jpg") == good
    store.close()


def test_a_name_in_two_shards_is_told(source: Path) -> None:
    files = {"a.json": b"{}", "a.0.png": b"x", "new.json": b"{}", "again.json": b"1"}
    write_tar(source / "train-000.tar", files)
    write_tar(source / "train-001.tar", {"a.json": b"[]", "b.json": b"{}"})
    problems = [found for found in index_source(source) if "another shard" in found.text]
    assert [(found.shard, found.member) for found in problems] == [("train-001.tar", "a.json")]
    store = SourceStore(source.parent, "set", "train")
    assert store._read("a.json") == b"{}"
    assert "b" in store.keys
    store.close()


def test_what_cannot_be_indexed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"name them train-000\.tar"):
        index_source(tmp_path)
    (tmp_path / "train-000.tar").write_bytes(b"no tar" * 400)
    with pytest.raises(ValueError, match=r"train-000\.tar cannot be read"):
        index_source(tmp_path)
    assert not (tmp_path / ".nv-meta").exists()
