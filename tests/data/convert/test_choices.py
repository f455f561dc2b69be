"""Fractions nest, limits count, images stay on one side, duplicates are seen, names are clean."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.data.convert.findings import IDS, duplicate_ids
from megatron_vl.data.convert.run import Request, convert, make_job
from megatron_vl.data.store import SourceStore
from tests.data.convert.pictures import album, write_files

ROWS = 400


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """Rows about ten images, in two files of one name and size."""
    folder = tmp_path_factory.mktemp("set")
    names = sorted(album())[:10]
    write_files(folder / "media", {name: album()[name] for name in names})
    for part in range(2):
        rows = [
            {
                "id": f"{part}-{index}",
                "image": names[index % 10],
                "conversations": [
                    {"from": "human", "value": f"<image> {part} {index}?"},
                    {"from": "gpt", "value": f"{index}."},
                ],
            }
            for index in range(ROWS // 2)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"part_{part}.jsonl").write_text(text)
    return Request("llava", folder, folder / "out", folder / "media", held_out=0.0)


def kept_ids(request: Request, out: Path) -> set[str]:
    request = replace(request, out=out / "set")
    report = convert(request)
    found = set()
    for split, count in report["kept"].items():
        if count:
            store = SourceStore(out, "set", split)
            rows = [json.loads(store._read(f"{key}.json")) for key in store.keys]
            assert len(rows) == count
            found |= {row["id"] for row in rows}
            store.close()
    return found


def test_a_source_that_holds_nothing_out_says_how_to(base: Request, tmp_path: Path) -> None:
    convert(replace(base, out=tmp_path / "set", limit=4))
    assert SourceStore(tmp_path, "set", "train").keys
    with pytest.raises(ValueError, match="no samples in its val split; `mvl data convert --held"):
        SourceStore(tmp_path, "set", "val")


def test_fractions_nest(base: Request, tmp_path: Path) -> None:
    every = {f"{part}-{index}" for part in range(2) for index in range(ROWS // 2)}
    found = {
        fraction: kept_ids(replace(base, fraction=fraction), tmp_path / str(fraction))
        for fraction in (0.1, 0.2, 0.7, 1.0)
    }
    assert found[0.1] < found[0.2] < found[0.7] < found[1.0] == every
    assert len(found[0.2]) == pytest.approx(0.2 * ROWS, abs=5 * (ROWS * 0.16) ** 0.5)
    other = kept_ids(replace(base, fraction=0.2, seed=1), tmp_path / "other")
    assert other != found[0.2]


def test_limits_count_chosen_rows(base: Request, tmp_path: Path) -> None:
    some = kept_ids(replace(base, fraction=0.5), tmp_path / "half")
    in_order = [f"{part}-{index}" for part in range(2) for index in range(ROWS // 2)]
    for limit in (1, 37, 150):
        found = kept_ids(replace(base, fraction=0.5, limit=limit), tmp_path / str(limit))
        assert found == set([name for name in in_order if name in some][:limit])


def test_an_image_is_held_out_or_trained_on(base: Request, tmp_path: Path) -> None:
    out = tmp_path / "set"
    report = convert(replace(base, out=out, held_out=0.3))
    assert 0 < report["kept"]["val"] < ROWS
    seen = {}
    for split in ("train", "val"):
        store = SourceStore(tmp_path, "set", split)
        seen[split] = {data for key in store.keys for data in store.sample(key).media()}
        store.close()
    assert not seen["train"] & seen["val"]
    assert len(seen["train"] | seen["val"]) == 10


def test_shards_hold_what_was_asked(base: Request, tmp_path: Path) -> None:
    out = tmp_path / "set"
    convert(replace(base, out=out, shard_size=50_000))
    sizes = [shard.stat().st_size for shard in out.glob("*.tar")]
    # A tar is padded to 20 blocks, which comes on top.
    assert max(sizes) <= 50_000 + 10_240
    assert sorted(sizes)[len(sizes) // 2] > 25_000


def test_duplicates_are_found_over_files() -> None:
    ids = np.array([(5, 0, 3), (9, 1, 1), (5, 1, 2), (5, 0, 1), (7, 0, 2), (9, 0, 8)], dtype=IDS)
    found = duplicate_ids(ids, ["a.jsonl", "b.jsonl"])
    assert [(one.file, one.row) for one in found] == [
        ("a.jsonl", 3),
        ("b.jsonl", 1),
        ("b.jsonl", 2),
    ]
    assert "row 1 of a.jsonl" in found[0].detail
    assert "row 8 of a.jsonl" in found[1].detail
    assert not duplicate_ids(ids[:2], ["a.jsonl", "b.jsonl"])
    assert not duplicate_ids(np.empty(0, dtype=IDS), [])


def test_keys_have_no_dots(base: Request, tmp_path: Path) -> None:
    convert(replace(base, out=tmp_path / "v1.5 (fine)", limit=5))
    store = SourceStore(tmp_path, "v1.5 (fine)", "train")
    assert store.keys[:2] == ("v1_5_fine_-0000-000000001", "v1_5_fine_-0000-000000002")
    row = json.loads(store._read(f"{store.keys[1]}.json"))
    assert row["origin"] == {"file": "part_0.jsonl", "row": 2}
    assert (row["id"], row["source"]) == ("0-1", "v1_5_fine_")
    store.close()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "llavva"}, "no format 'llavva'; there are nemotron-v2"),
        ({"fraction": 1.5}, r"--fraction is 1\.5.*nearest: 1\.0"),
        ({"held_out": -1.0}, r"--held-out is -1\.0"),
        ({"limit": -1}, "neither is below zero"),
        ({"media_root": Path("/no/such")}, "media root /no/such is no folder"),
        ({"source": Path("/no/such")}, "no such file"),
        ({"format": "hf-parquet"}, r"holds no \.parquet file"),
        ({"format": "nemotron-v1"}, "convert one at a time"),
    ],
)
def test_requests_that_are_refused(base: Request, changes: dict, message: str) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make_job(replace(base, **changes))


def test_nothing_kept_is_an_error(base: Request, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    request = replace(base, out=tmp_path / "set", media_root=tmp_path / "empty", strict=False)
    with pytest.raises(ValueError, match=r"could be kept; the first: part_0\.jsonl, row 1"):
        convert(request)
