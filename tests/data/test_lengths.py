"""Length tables: made once, from headers alone, whole or not at all."""

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.data import lengths as lengths_room
from megatron_vl.data import prepare
from megatron_vl.data.fit import Room, fit_sample, headers_of, shorten
from megatron_vl.data.lengths import LengthTable, build_length_tables, length_table
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from tests.conftest import LAPTOP, SmallData
from tests.data.conftest import with_data


@pytest.fixture
def ocr(root: Path) -> Iterator[SourceStore]:
    store = SourceStore(root, "ocr", "train")
    yield store
    store.close()


def room(stage: StageConfig, length: int) -> Room:
    return Room.of(with_data(stage, sequence_length=length))


def tables(root: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (root / "lengths").glob("*/*.npy")}


def test_a_table_holds_every_sample_as_it_fits(
    stage: StageConfig, ocr: SourceStore, tokenizer: Tokenizer
) -> None:
    made = length_table(ocr, tokenizer, room(stage, 470))
    assert len(made) == len(ocr.keys)
    for index, key in enumerate(ocr.keys):
        sample = ocr.sample(key)
        assert made.key(index) == key
        assert made.fitted(index) == fit_sample(
            sample, headers_of(sample), tokenizer, room(stage, 470)
        )
    lengths = [made.fitted(index).length for index in range(len(made))]
    assert made.sizes.lengths_N.tolist() == lengths
    assert made.mean_length == pytest.approx(np.mean([one for one in lengths if one]))


def test_tables_are_made_once_and_anew_for_another_room(
    stage: StageConfig, root: Path, ocr: SourceStore, tokenizer: Tokenizer
) -> None:
    lines: list[str] = []
    first = length_table(ocr, tokenizer, room(stage, 471), progress=lines.append)
    assert lines[-1].startswith("lengths of ocr train: 30 of 30, ")
    before = tables(root)
    again = length_table(ocr, tokenizer, room(stage, 471), progress=lines.append)
    assert len(lines) == 1
    assert tables(root) == before
    for name, column in first.columns.items():
        assert (column == again.columns[name]).all()
    length_table(ocr, tokenizer, room(stage, 472))
    assert len(tables(root)) == len(before) + len(first.columns)
    assert not list((root / "lengths").glob("*.part"))


def test_a_half_written_table_is_made_again(
    stage: StageConfig, root: Path, ocr: SourceStore, tokenizer: Tokenizer
) -> None:
    whole = length_table(ocr, tokenizer, room(stage, 473))
    (folder,) = {p.parent for p in tables(root) if "ocr-train" in str(p)} & {
        lengths_room._table_folder(ocr, room(stage, 473))
    }
    (folder / "tiles.npy").unlink()
    again = length_table(ocr, tokenizer, room(stage, 473))
    assert (again.columns["length"] == whole.columns["length"]).all()
    assert (folder / "tiles.npy").exists()


def test_a_read_only_root_is_read_all_the_same(
    stage: StageConfig, ocr: SourceStore, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **settings: object) -> None:
        raise PermissionError("read-only file system")

    for name in ("mkdir", "write_text"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(os, "rename", refuse)
    made = length_table(ocr, tokenizer, room(stage, 474))
    assert len(made) == 30


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_processes_make_the_same_table(
    stage: StageConfig,
    ocr: SourceStore,
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    workers: int,
) -> None:
    """With one worker what the processes would do is done here."""
    monkeypatch.setattr(lengths_room, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(lengths_room, "_CHUNK", 11)
    parallel = length_table(ocr, tokenizer, room(stage, 475 + workers), workers=workers)
    monkeypatch.undo()
    folder = lengths_room._table_folder(ocr, room(stage, 475 + workers))
    for file in folder.iterdir():
        file.unlink()
    serial = length_table(ocr, tokenizer, room(stage, 475 + workers))
    for name, column in serial.columns.items():
        assert (column == parallel.columns[name]).all()


class Broken:
    """A store some of whose samples cannot be read."""

    def __init__(self, store: SourceStore, broken: set[int]) -> None:
        self._store = store
        self._broken = {store.keys[at] for at in broken}
        self.keys, self.folder, self.source = store.keys, store.folder, store.source
        self.split, self.identity = store.split, f"broken {sorted(broken)}"

    def sample(self, key: str) -> object:
        if key in self._broken:
            raise ValueError("no JSON")
        return self._store.sample(key)


def broken_table(
    stage: StageConfig, store: SourceStore, tokenizer: Tokenizer, broken: set[int]
) -> LengthTable:
    return length_table(Broken(store, broken), tokenizer, room(stage, 470))  # type: ignore[arg-type]


def test_broken_samples_have_length_0_and_are_counted(
    stage: StageConfig, ocr: SourceStore, tokenizer: Tokenizer
) -> None:
    made = broken_table(stage, ocr, tokenizer, {*range(5), 20})
    assert made.bad == 6
    assert made.errors[0] == f"{ocr.keys[0]}: ValueError: no JSON"
    zero = set(np.flatnonzero(made.sizes.lengths_N == 0).tolist())
    assert {*range(5), 20} <= zero
    whole = length_table(ocr, tokenizer, room(stage, 470))
    rest = sorted(set(range(30)) - {*range(5), 20})
    assert (made.columns["length"][rest] == whole.columns["length"][rest]).all()
    with pytest.raises(ValueError, match=r"source's fault rather than theirs: .*no JSON"):
        broken_table(stage, ocr, tokenizer, set(range(16)))


def test_a_stages_tables_are_made_beforehand(stage: StageConfig, root: Path) -> None:
    other = with_data(stage, sequence_length=478, blend={"text": 1.0, "code": 2.0})
    before = len(tables(root))
    lines: list[str] = []
    build_length_tables(other, progress=lines.append)
    made = {line.split(":")[0] for line in lines}
    assert made == {f"lengths of {s} {p}" for s in ("text", "code") for p in ("train", "val")}
    assert len(tables(root)) > before
    build_length_tables(other, progress=lines.append)
    assert len(lines) == 4


def test_preparing_a_recipe_makes_its_stages_tables(
    small_data: SmallData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "prepare_laptop", lambda *args, **settings: small_data.root)
    lines: list[str] = []
    overrides = [small_data.override, "data.sequence_length=474"]
    for _ in range(2):
        prepare.prepare_recipe(LAPTOP / "stage1.yaml", overrides, progress=lines.append)
    stage = load_stage(LAPTOP / "stage1.yaml", overrides)
    assert len(lines) == 2 * len(stage.data.blend)


def test_long_samples_give_way_step_by_step(
    stage: StageConfig, root: Path, tokenizer: Tokenizer
) -> None:
    limits = set()
    for source in ("captions", "ocr"):
        store = SourceStore(root, source, "train")
        table = length_table(store, tokenizer, room(stage, 128))
        store.close()
        limits |= set(table.columns["max_tiles"].tolist())
        assert table.columns["length"].max() <= 128
    assert 12 in limits
    assert len(limits) > 1
    store = SourceStore(root, "long_text", "train")
    long = length_table(store, tokenizer, room(stage, 600))
    fitted = [long.fitted(index) for index in range(len(long))]
    cut = [row for row in fitted if row.kept_characters >= 0]
    assert cut
    for row in cut:
        assert 560 < row.length <= 600
        before = store.sample(row.key).messages
        after = shorten(before, row.kept_characters)
        assert after[1:] == before[1:]
        assert after[0]["content"][1] == before[0]["content"][1], "the question stays"
        document = before[0]["content"][0]["text"]
        assert document.startswith(after[0]["content"][0]["text"])
    store.close()


def test_pictures_shrink_to_the_tiles_a_pack_may_have(
    stage: StageConfig, ocr: SourceStore, tokenizer: Tokenizer
) -> None:
    free = length_table(ocr, tokenizer, room(stage, 500))
    assert free.columns["tiles"].max() > 3
    tight = Room.of(with_data(stage, sequence_length=500, max_tiles_per_pack=3))
    capped = length_table(ocr, tokenizer, tight)
    assert capped.columns["tiles"].max() == 3
    assert (capped.columns["length"] > 0).all()
    already = free.columns["tiles"] <= 3
    assert (capped.columns["tiles"] == free.columns["tiles"])[already].all()
