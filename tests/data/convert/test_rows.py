"""Rows are told apart whatever is in them, and media never come from outside their root."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from megatron_vl.data.convert.conversation import Fault, Medium, Reason
from megatron_vl.data.convert.media import MediaFinder, write_catalogue
from megatron_vl.data.convert.rows import find_rows, read_rows
from tests.data.convert.pictures import write_files
from tests.data.convert.replicas import write_tars

TEXT = some.text(max_size=12) | some.sampled_from(['"', "\\", "[{", "}]", '\\"', "},{", "\n"])
VALUES = some.recursive(
    TEXT | some.integers() | some.none() | some.booleans(),
    lambda inner: some.lists(inner, max_size=3) | some.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
OBJECTS = some.dictionaries(TEXT, VALUES, max_size=4)


def rows_of(path: Path) -> list[tuple[int, Any]]:
    return list(read_rows(path, find_rows(path)))


@given(rows=some.lists(OBJECTS, max_size=6), indent=some.sampled_from([None, 0, 2]))
@settings(max_examples=60)
def test_json_and_jsonl_give_what_json_gives(
    tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]], indent: int | None
) -> None:
    path = tmp_path_factory.getbasetemp() / "some.json"
    for ascii_only in (True, False):
        text = json.dumps(rows, indent=indent, ensure_ascii=ascii_only)
        path.write_bytes(text.encode(errors="surrogatepass"))
        if ascii_only:
            assert rows_of(path) == list(enumerate(json.loads(text), 1))
        assert len(find_rows(path)) == len(rows)
    lines = path.with_suffix(".jsonl")
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [row for _, row in rows_of(lines)] == rows


def test_broken_elements_lose_no_others(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(
        '\ufeff [ {"id": 1}, {"id" 2}, [3], {"id": 4,}, 5, "six, {", {"a": "}]\\"{"}, null ]\n'
    )
    found = rows_of(path)
    good = {number: row for number, row in found if not isinstance(row, Fault)}
    assert good == {1: {"id": 1}, 6: {"a": '}]"{'}}
    reasons = {number: row.reason for number, row in found if isinstance(row, Fault)}
    assert reasons == {
        2: Reason.BAD_JSON,
        3: Reason.WRONG_TYPE,
        4: Reason.BAD_JSON,
        5: Reason.BAD_JSON,  # 5 and "six, {" stand together: no object, so one faulty row
        7: Reason.WRONG_TYPE,
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": 1}', "holds no list of rows"),
        ('{"data": []}', "holds no list of rows"),
        ('[{"id": 1}, {"id": "2}]', r"a quote that does not close in row 2"),
        ('[{"id": 1}, {"id": 2}, {"id": {}', "a bracket that does not close in row 3"),
        ("", "is empty"),
        ("   ", "does not close"),
    ],
)
def test_files_whose_rows_cannot_be_told_apart(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        find_rows(path)


def test_lines_are_numbered_as_an_editor_numbers_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n\n  \n{"a": 4}\r\n[5]\n\xff\xfe\n{"a": 7}')
    found = rows_of(path)
    assert [number for number, _ in found] == [1, 4, 5, 6, 7]
    assert [row for _, row in found if isinstance(row, dict)] == [{"a": 1}, {"a": 4}, {"a": 7}]
    assert [row.reason for _, row in found if isinstance(row, Fault)] == [
        Reason.WRONG_TYPE,
        Reason.BAD_JSON,
    ]
    deep = tmp_path / "deep.jsonl"
    deep.write_text("[" * 200_000 + "\n")
    ((_, row),) = rows_of(deep)
    assert isinstance(row, Fault)


def test_a_parquet_file_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1 and not much else PAR1")
    with pytest.raises(ValueError, match="no parquet file that can be read"):
        find_rows(path)


@pytest.fixture
def finder(tmp_path: Path) -> MediaFinder:
    write_files(tmp_path, {"secret.jpg": b"secret", "root/a/b.jpg": b"b", "second/c.jpg": b"c"})
    (tmp_path / "root" / "a" / "linked.jpg").symlink_to(tmp_path / "second" / "c.jpg")
    return MediaFinder([tmp_path / "root", tmp_path / "second"])


def test_media_by_name(finder: MediaFinder, tmp_path: Path) -> None:
    names = {
        "a/b.jpg": b"b",
        "./a/b.jpg": b"b",
        "a/../a/b.jpg": b"b",
        "c.jpg": b"c",
        "a/linked.jpg": b"c",
        str(tmp_path / "root" / "a" / "b.jpg"): b"b",
    }
    for name, data in names.items():
        assert finder.read(Medium("image", name)) == data
        assert finder.size(Medium("image", name)) == len(data)
    assert finder.read(Medium("image", "anything", b"bytes")) == b"bytes"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../secret.jpg", Reason.OUTSIDE),
        ("a/../../secret.jpg", Reason.OUTSIDE),
        ("/etc/passwd", Reason.OUTSIDE),
        ("a\0b.jpg", Reason.OUTSIDE),
        ("a", Reason.MISSING),
        ("nowhere.jpg", Reason.MISSING),
        ("x" * 5000, Reason.MISSING),
        ("http://example.org/a.jpg", Reason.REMOTE),
        ("s3://bucket/a.jpg", Reason.REMOTE),
    ],
)
def test_media_that_are_refused(finder: MediaFinder, name: str, reason: Reason) -> None:
    with pytest.raises(Fault) as caught:
        finder.read(Medium("image", name))
    assert caught.value.reason is reason
    assert finder.size(Medium("image", name)) == 0


def test_media_in_tars(tmp_path: Path) -> None:
    files = {f"train/png/p_{index}.png": bytes([index]) * (index * 37) for index in range(40)}
    write_tars(tmp_path / "tars", files, 3)
    whole = (tmp_path / "tars" / "shard_000000.tar").read_bytes()
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in (("good.png", b"g" * 700), ("cut.png", b"c" * 5000)):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (tmp_path / "tars" / "torn.tar").write_bytes(stream.getvalue()[:3000])
    (tmp_path / "tars" / "none.tar").write_bytes(b"no tar at all " * 100)
    (tmp_path / "tars" / "twice.tar").write_bytes(whole)
    tars = sorted((tmp_path / "tars").glob("*.tar"))
    problems = list(write_catalogue(tmp_path / "media.sqlite", tars))
    assert [bool(problem) for problem in problems] == [
        path.name in ("torn.tar", "none.tar") for path in tars
    ]
    finder = MediaFinder([tmp_path], tmp_path / "media.sqlite")
    for name, data in files.items():
        assert finder.read(Medium("image", name)) == data
    assert finder.read(Medium("image", "good.png")) == b"g" * 700
    with pytest.raises(Fault, match="cut off"):
        finder.read(Medium("image", "cut.png"))
    finder.close()
