"""Every trouble planted in a prepared source is found at its key, and no other."""

import io
import json
import tarfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from megatron_vl.data.index import index_source
from megatron_vl.data.validate import validate
from tests.data.convert.pictures import album, clip, encoded, picture

ROWS = 400
ORDER = sorted(album())


@dataclass
class Made:
    """A sample on its way into a tar: its row, its files, and what is wrong with it."""

    key: str
    row: Any
    files: dict[str, bytes] = field(default_factory=dict)
    raw: bytes | None = None
    wrong: str = ""


def sample(key: str, index: int) -> Made:
    name = ORDER[index % len(ORDER)]
    medium = f"{key}.0.{name.rsplit('.')[-1]}"
    content = [{"type": "image", "image": medium}, {"type": "text", "text": f"what is {key}?"}]
    answer = {"role": "assistant", "content": f"it is {index}"}
    made = Made(key, {"messages": [{"role": "user", "content": content}, answer]})
    made.files[medium] = album()[name]
    return made


def medium_of(made: Made) -> str:
    return next(iter(made.files))


def with_bytes(data: bytes) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made.files[medium_of(made)] = data

    return change


def with_video(data: bytes) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        name = f"{made.key}.0.mp4"
        made.files = {name: data}
        made.row["messages"][0]["content"][0] = {"type": "video", "video": name}

    return change


def without_file(made: Made) -> None:
    made.files.clear()


def with_orphan(made: Made) -> None:
    made.files[f"{made.key}.1.jpg"] = album()[ORDER[3]]


def with_wrong_size(made: Made) -> None:
    made.row["messages"][0]["content"][0]["metadata"] = {"width": 5, "height": 5000}


def answer(text: str) -> Callable[[Made], None]:
    return lambda made: made.row["messages"][1].update(content=text)


def raw(data: bytes) -> Callable[[Made], None]:
    def change(made: Made) -> None:
        made.raw = data

    return change


def role(word: str) -> Callable[[Made], None]:
    return lambda made: made.row["messages"][1].update(role=word)


PICTURE = encoded(picture(77, 150, 120), "JPEG")
PNG = encoded(picture(78, 150, 120), "PNG")
BROKEN_PNG = PNG[:2000] + bytes(200) + PNG[2200:]
CLIP = clip(6, frames=20)
MIDDLE = CLIP.index(b"mdat") + 200
BROKEN_CLIP = CLIP[:MIDDLE] + bytes(len(CLIP) - MIDDLE - 1200) + CLIP[-1200:]

TROUBLES: list[tuple[str, Callable[[Made], None]]] = [
    ("unreadable row", raw(b'{"messages": [')),
    ("unreadable row", raw(b'{"messages": []}')),
    ("unreadable row", raw(b"[1, 2]")),
    ("unknown role", role("narrator")),
    ("no assistant turn", role("user")),
    ("empty content", answer(" \n")),
    ("empty content", answer("<think>all thought</think>")),
    ("missing medium", without_file),
    ("unreadable medium", with_bytes(b"")),
    ("unreadable medium", with_bytes(PICTURE[:80])),
    ("unreadable medium", with_bytes(PICTURE[: len(PICTURE) // 2])),
    ("unreadable medium", with_video(CLIP[:-500])),
    ("size differs from its row", with_wrong_size),
    ("medium no row shows", with_orphan),
]
HIDDEN: list[tuple[str, Callable[[Made], None]]] = [
    ("unreadable medium", with_bytes(BROKEN_PNG)),
    ("unreadable medium", with_video(BROKEN_CLIP)),
]
"""Troubles that show only when everything is decoded."""


def write(folder: Path, made: dict[str, list[Made]]) -> None:
    folder.mkdir(parents=True)
    for split, samples in made.items():
        with tarfile.open(folder / f"{split}-000.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
            for one in samples:
                row = one.raw if one.raw is not None else json.dumps(one.row).encode()
                for name, data in {f"{one.key}.json": row, **one.files}.items():
                    info = tarfile.TarInfo(name)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
    index_source(folder)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str], set[str]]:
    """A source, the reason of every bad key, and the keys that only decoding shows."""
    folder = tmp_path_factory.mktemp("data") / "set"
    made = {
        "train": [sample(f"train_{index:04d}", index) for index in range(ROWS)],
        "val": [sample(f"val_{index:04d}", index) for index in range(20)],
    }
    every = made["train"] + made["val"]
    hidden = set()
    for at, (reason, change) in enumerate([*TROUBLES, *HIDDEN]):
        one = every[25 * at + 7]
        change(one)
        one.wrong = reason
        if at >= len(TROUBLES):
            hidden.add(one.key)
    for copy, original in ((every[60], every[2]), (made["val"][3], every[5])):
        copy.row = json.loads(json.dumps(original.row).replace(original.key, copy.key))
        copy.row["messages"][0]["content"][1] = original.row["messages"][0]["content"][1]
        copy.files = {
            name.replace(original.key, copy.key): data for name, data in original.files.items()
        }
        copy.wrong = "duplicate sample"
    write(folder, made)
    return folder, {one.key: one.wrong for one in every if one.wrong}, hidden


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_every_planted_trouble_is_found(
    planted: tuple[Path, dict[str, str], set[str]], workers: int
) -> None:
    folder, wrong, hidden = planted
    told: list[tuple[str, int, int]] = []
    samples, found = validate(
        [folder], decode_all=True, workers=workers, tell=lambda *args: told.append(args)
    )
    assert samples == ROWS + 20
    assert {one.key: one.reason for one in found} == wrong
    assert len(found) == len(wrong)
    assert told[-1][1:] == (ROWS + 20, ROWS + 20)
    headers_only = validate([folder])[1]
    assert {one.key for one in headers_only} == wrong.keys() - hidden


def test_findings_say_what_and_where(planted: tuple[Path, dict[str, str], set[str]]) -> None:
    found = {one.reason: one for one in validate([planted[0]])[1]}
    duplicate = found["duplicate sample"]
    assert duplicate.split == "val"
    assert "train_0005 of train says and shows the same" in duplicate.text()
    assert "width is" in found["size differs from its row"].detail
    assert found["medium no row shows"].detail.endswith(".1.jpg")
    assert found["unknown role"].text().startswith("set/train: train_")


def test_a_whole_source_has_no_findings(tmp_path: Path) -> None:
    write(tmp_path / "set", {"train": [sample(f"a{index}", index) for index in range(50)]})
    assert validate([tmp_path / "set"], decode_all=True) == (50, [])
