"""Building the laptop's data: whole or absent, the same twice, readable by energon."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.chat import visual_parts
from megatron_vl.data.fit import headers_of
from megatron_vl.data.laptop_sources import held_out_count, source_samples
from megatron_vl.data.marker import MARKER, built_by_other_code, read_marker
from megatron_vl.data.prepare import TOKENIZER_FILE, prepare_laptop
from megatron_vl.data.store import SourceStore
from tests.data.conftest import SIZES


def contents(root: Path) -> dict[str, str]:
    """Digests of everything that is not an energon index (those hold random ids)."""
    return {
        str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(root.rglob("*"))
        if file.is_file() and ".nv-meta" not in file.parts and "lengths" not in file.parts
    }


def test_a_second_call_does_nothing(stage: StageConfig, root: Path) -> None:
    lines: list[str] = []
    before = {file: file.stat().st_mtime_ns for file in root.rglob("*")}
    prepare_laptop(stage.data, stage.model, seed=7, sizes=SIZES, progress=lines.append)
    assert {file: file.stat().st_mtime_ns for file in root.rglob("*")} == before
    assert len(lines) == 1
    assert "nothing to do" in lines[0]


def test_same_inputs_same_bytes_and_unfinished_builds_start_over(
    stage: StageConfig, root: Path, tmp_path: Path
) -> None:
    data = replace(stage.data, root=str(tmp_path / "again"))
    stale = tmp_path / ".again.building"
    stale.mkdir()
    (stale / "half.tar").write_text("interrupted")
    lines: list[str] = []
    made = prepare_laptop(data, stage.model, seed=7, sizes=SIZES, progress=lines.append)
    assert contents(made) == contents(root)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again"]
    assert [line.split(":")[0] for line in lines[: len(SIZES)]] == list(SIZES)


def test_other_inputs_build_again(stage: StageConfig, tmp_path: Path) -> None:
    data = replace(stage.data, root=str(tmp_path / "data"))
    quiet = {"progress": lambda line: None}
    for seed in (1, 2):
        prepare_laptop(data, stage.model, seed=seed, sizes={"text": 8}, **quiet)
    marker = read_marker(tmp_path / "data")
    assert marker is not None
    assert marker["inputs"]["seed"] == 2
    assert marker["sources"] == {"text": {"train": 8, "val": 8}}


def test_a_folder_of_something_else_is_refused(stage: StageConfig, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    data = replace(stage.data, root=str(tmp_path))
    with pytest.raises(ValueError, match="not made by this command"):
        prepare_laptop(data, stage.model, seed=1, sizes={"text": 8})
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.filterwarnings("ignore:.*pin_memory")
def test_energon_opens_what_was_prepared(root: Path) -> None:
    from megatron.energon import (
        TextSample,
        WorkerConfig,
        get_loader,
        get_val_dataset,
        load_dataset,
    )
    from megatron.energon.task_encoder import Cooker, DefaultTaskEncoder, basic_sample_keys
    from megatron.energon.task_encoder.base import stateless

    @stateless
    def cook(sample: dict) -> TextSample:
        row = sample["json"]
        row = row if isinstance(row, dict) else json.loads(row)
        return TextSample(**basic_sample_keys(sample), text=row["id"])

    class Encoder(DefaultTaskEncoder):
        cookers = [Cooker(cook)]  # noqa: RUF012

        def encode_sample(self, sample: TextSample) -> TextSample:
            return sample

        def batch(self, samples: list[TextSample]) -> list[TextSample]:
            return samples

    assert load_dataset(root / "ocr") is not None
    dataset = get_val_dataset(
        root / "ocr",
        worker_config=WorkerConfig(rank=0, world_size=1, num_workers=0),
        batch_size=1,
        task_encoder=Encoder(),
    )
    keys = [batch[0].text for batch in get_loader(dataset)]
    assert keys == list(SourceStore(root, "ocr", "val").keys)


def test_the_store_reads_by_key(root: Path) -> None:
    store = SourceStore(root, "captions", "train")
    assert len(store.keys) == SIZES["captions"]
    sample = store.sample(store.keys[3])
    assert [message["role"] for message in sample.messages] == ["user", "assistant"]
    (image,) = sample.media()
    (size,) = headers_of(sample)
    known = store._files.get_media_metadata(visual_parts(sample.messages)[0]["image"])
    assert (known.width, known.height) == size
    assert image[:2] == b"\xff\xd8"


def test_store_errors(root: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="mvl data prepare stages/laptop"):
        SourceStore(tmp_path / "none", "ocr", "train")
    with pytest.raises(ValueError, match="found: captions, clips, code, long_text, ocr, qa, text"):
        SourceStore(root, "video", "train")
    with pytest.raises(ValueError, match="'test'"):
        SourceStore(root, "ocr", "test")


@pytest.mark.parametrize("source", SIZES)
def test_held_out_samples_are_others(root: Path, source: str) -> None:
    rows = {}
    for split in ("train", "val"):
        store = SourceStore(root, source, split)
        samples = [store.sample(key) for key in store.keys]
        rows[split] = {
            (json.dumps([m["content"][-1] for m in s.messages]), *s.media()) for s in samples
        }
    assert not rows["train"] & rows["val"]
    assert held_out_count(1500) == 150


def test_samples_are_deterministic_and_checked() -> None:
    make = {"split": "train", "count": 5, "tile_size": 64}
    once = list(source_samples("qa", seed=1, **make))
    assert once == list(source_samples("qa", seed=1, **make))
    assert once != list(source_samples("qa", seed=2, **make))
    with pytest.raises(ValueError, match="unknown source 'video'"):
        next(source_samples("video", seed=1, **make))


def test_an_interrupted_build_is_not_taken_for_a_finished_one(root: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    shutil.copytree(root / "ocr", half / "ocr")
    assert read_marker(half) is None
    (half / MARKER).write_text("{")
    assert read_marker(half) is None


def test_a_released_tokenizer_is_taken_as_it_is(
    stage: StageConfig, root: Path, tmp_path: Path
) -> None:
    released = root / TOKENIZER_FILE
    data = replace(stage.data, root=str(tmp_path / "data"), tokenizer=str(released))
    quiet = {"progress": lambda line: None}
    prepare_laptop(data, stage.model, seed=1, sizes={"text": 8}, **quiet)
    assert (tmp_path / "data" / TOKENIZER_FILE).read_bytes() == released.read_bytes()
    with pytest.raises(ValueError, match=r"set model\.vocab_size="):
        prepare_laptop(data, replace(stage.model, vocab_size=2050), seed=1, sizes={}, **quiet)
    gone = replace(data, tokenizer=str(tmp_path / "nowhere.json"))
    with pytest.raises(FileNotFoundError, match="names no file"):
        prepare_laptop(gone, stage.model, seed=1, sizes={}, **quiet)


def test_a_build_of_another_builder_is_told_apart(root: Path, tmp_path: Path) -> None:
    assert not built_by_other_code(root)
    assert not built_by_other_code(tmp_path)
    marker = json.loads((root / MARKER).read_text())
    marker["inputs"]["code"] = "0" * 16
    (tmp_path / MARKER).write_text(json.dumps(marker))
    assert built_by_other_code(tmp_path)
