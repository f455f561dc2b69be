"""Nemotron v2 read where it lies: sizes from the files, media in tars or folders, stale indexes."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.data.convert.run import Request, convert
from megatron_vl.data.store import SourceStore
from tests.data.convert.pictures import ORIENTATION, album, clip, encoded, picture, write_files
from tests.data.convert.replicas import write_tars

TURNED = encoded(picture(7, 60, 30), "JPEG", orientation=6)
MEDIA = {**album(), "clips/a.mp4": clip(4), "turned.jpg": TURNED}
assert ORIENTATION == 0x0112


def write_set(folder: Path, names: list[str], *, tars: bool) -> Request:
    """One row a medium; the rows' own sizes are wrong."""
    folder.mkdir(parents=True)
    rows = []
    for index, name in enumerate(names):
        kind = "video" if name.endswith("mp4") else "image"
        part = {"type": kind, kind: name, "metadata": {"width": 1, "height": 1, "url": "x"}}
        text = {"type": "text", "text": f"what is {index}?"}
        answer = {"role": "assistant", "content": f"<think>hm</think>it is {index}"}
        row = {"id": name, "messages": [{"role": "user", "content": [part, text]}, answer]}
        rows.append(json.dumps(row))
    (folder / "set.jsonl").write_text("\n".join(rows) + "\n")
    if tars:
        write_tars(folder / "media", MEDIA, 4)
    else:
        write_files(folder / "media", MEDIA)
    return Request("nemotron-v2", folder, folder.parent / "data" / "v2", held_out=0.2)


@pytest.mark.parametrize("tars", [True, False])
def test_sizes_come_from_the_files(tmp_path: Path, tars: bool) -> None:
    names = sorted(MEDIA)
    request = write_set(tmp_path / "set", names, tars=tars)
    convert(request)
    seen = []
    for split in ("train", "val"):
        store = SourceStore(tmp_path / "data", "v2", split)
        for key in store.keys:
            sample = store.sample(key)
            part = sample.messages[0]["content"][0]
            name = part[part["type"]]
            seen.append(name)
            assert sample.media() == [MEDIA[name]]
            if name == "turned.jpg":
                assert (part["metadata"]["width"], part["metadata"]["height"]) == (30, 60)
            if part["type"] == "video":
                assert part["metadata"]["video_num_frames"] == 9
            else:
                assert part["metadata"]["width"] > 1
            assert sample.messages[1]["content"][0]["text"].startswith("<think>hm")
        store.close()
    assert sorted(seen) == names


def test_an_index_knows_its_rows(tmp_path: Path) -> None:
    request = write_set(tmp_path / "set", sorted(MEDIA)[:6], tars=True)
    convert(request)
    store = SourceStore(tmp_path / "data", "v2", "train")
    for key in ("v2-0000-000000099", "v2-0000-x", "other-0000-000000001"):
        with pytest.raises(KeyError):
            store.sample(key)
    before = store.identity
    store.close()
    rows = tmp_path / "set" / "set.jsonl"
    text = rows.read_text()
    rows.write_text(text.replace("what is", "what was"))
    with pytest.raises(ValueError, match=r"has changed since .* convert it again"):
        SourceStore(tmp_path / "data", "v2", "train")
    again = replace(request, out=tmp_path / "again" / "v2")
    convert(again)
    other = SourceStore(tmp_path / "again", "v2", "train")
    assert other.identity != before
    other.close()
    rows.unlink()
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        SourceStore(tmp_path / "again", "v2", "train")


def test_nothing_is_written_beside_the_source(tmp_path: Path) -> None:
    request = write_set(tmp_path / "set", sorted(MEDIA), tars=True)
    for path in [*(tmp_path / "set").rglob("*")]:
        os.chmod(path, 0o555 if path.is_dir() else 0o444)
    before = sorted((tmp_path / "set").rglob("*"))
    convert(request)
    assert sorted((tmp_path / "set").rglob("*")) == before
    size = sum(path.lstat().st_size for path in request.out.rglob("*"))
    assert size < sum(map(len, MEDIA.values())), "an index, not a copy"
