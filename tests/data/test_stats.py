"""Statistics are those of the samples, counted a second way; a stage's are those of its packs."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.bench import time_source, time_stage
from megatron_vl.data.encode import encode_sample
from megatron_vl.data.fit import Room, fit_sample, headers_of
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.stats import histogram, source_stats, stage_stats
from megatron_vl.data.store import SourceStore
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.data.view import open_view, source_folders
from tests.data.conftest import with_data


def by_source(stats: dict) -> dict[tuple[str, str], dict]:
    return {(entry["source"], entry["split"]): entry for entry in stats["sources"]}


def test_sources_are_counted_as_they_are_encoded(
    stage: StageConfig, root: Path, tokenizer: Tokenizer
) -> None:
    config = with_data(stage, sequence_length=160)
    found = by_source(source_stats(source_folders(root), config, None))
    assert found.keys() == {
        (path.name, split) for path in source_folders(root) for split in ("train", "val")
    }
    for source in ("ocr", "code"):
        store = SourceStore(root, source, "train")
        lengths, tiles, dropped = [], [], 0
        for key in store.keys:
            sample = store.sample(key)
            fitted = fit_sample(sample, headers_of(sample), tokenizer, Room.of(config))
            if fitted.length == 0:
                dropped += 1
                continue
            document, pixels = encode_sample(store, fitted, tokenizer, Room.of(config))
            lengths.append(len(document))
            tiles.append(sum(map(len, pixels)))
        entry = found[source, "train"]
        assert entry["samples"] == len(store.keys)
        assert (entry["fit"], entry["too_long"]) == (len(lengths), dropped)
        assert entry["tokens"]["sum"] == sum(lengths)
        assert entry["tokens"]["max"] == max(lengths)
        assert entry["tokens"]["p50"] == np.percentile(lengths, 50)
        assert entry["tiles"]["sum"] == sum(tiles)
        assert sum(count for _, count in entry["tokens_histogram"]) == len(lengths)
        store.close()
    assert found["code", "train"]["too_long"] > 0
    train = [entry for (_, split), entry in found.items() if split == "train"]
    tokens = sum(entry["tokens"]["sum"] for entry in train)
    for entry in train:
        assert entry["share_of_tokens"] == pytest.approx(entry["tokens"]["sum"] / tokens, abs=1e-6)
    assert sum(entry["share_of_samples"] for entry in train) == pytest.approx(1, abs=1e-5)


def test_what_gives_way_is_counted(stage: StageConfig, root: Path) -> None:
    for source, length, what in (("captions", 128, "fewer_tiles"), ("long_text", 600, "text_cut")):
        found = source_stats([root / source], with_data(stage, sequence_length=length), None)
        assert by_source(found)[source, "train"][what] > 0
    wide = by_source(source_stats([root / "captions"], with_data(stage), None))
    assert wide["captions", "train"]["fewer_tiles"] == 0


@pytest.mark.slow
def test_processes_change_nothing(stage: StageConfig, root: Path) -> None:
    folders = [root / "ocr", root / "text"]
    assert source_stats(folders, stage, None, workers=2) == source_stats(folders, stage, None)


def test_a_stages_packs_are_those_of_its_loader(stage: StageConfig) -> None:
    config = replace(stage, train=replace(stage.train, steps=6))
    found = stage_stats(config)
    loader = PackLoader(config, split="train", rank=0, size=1)
    packs = [pack for _ in range(6) for pack in loader.next_batch()]
    loader.close()
    plan = found["plan"]
    assert plan["packs"] == len(packs) == 24
    filled = sum(pack.num_tokens for pack in packs) / (24 * 512)
    assert plan["fill"] == pytest.approx(filled, abs=1e-6)
    counts = Counter(key.split("_train_")[0] for pack in packs for key in pack.sample_keys)
    for source, count in counts.items():
        share = count / sum(counts.values())
        assert plan["samples"][source] == pytest.approx(share, abs=1e-6)
    assert plan["samples_a_pack"]["max"] == max(len(pack.sample_keys) for pack in packs)
    assert plan["tiles_a_pack"]["sum"] == sum(len(pack.grids) for pack in packs)
    assert {entry["source"] for entry in found["sources"]} == set(config.data.blend)


def test_histograms() -> None:
    values = np.array([0, 1, 64, 65, 500, 10**7])
    assert histogram(values, (0, 64, 512)) == [
        ["<= 0", 1],
        ["<= 64", 2],
        ["<= 512", 2],
        ["> 512", 1],
    ]
    assert histogram(values[:2], (0, 64, 512)) == [["<= 0", 1], ["<= 64", 1]]
    assert histogram(values[:0], (0, 64)) == []


def test_views(stage: StageConfig, root: Path, tmp_path: Path) -> None:
    view = open_view(root / "ocr", None, None)
    assert (view.room.sequence_length, view.room.tile_size) == (16384, 512)
    assert open_view(root / "ocr", stage, None).room == Room.of(stage)
    other = tmp_path / "words.json"
    other.write_bytes((root / "tokenizer" / "tokenizer.json").read_bytes())
    assert open_view(tmp_path, None, other).tokenizer.vocab_size == 2048
    with pytest.raises(ValueError, match="name one with --tokenizer"):
        open_view(tmp_path, None, None)
    with pytest.raises(ValueError, match="mvl data convert"):
        source_folders(tmp_path)
    with pytest.raises(FileNotFoundError):
        source_folders(tmp_path / "none")


def test_measuring(stage: StageConfig, root: Path) -> None:
    store = SourceStore(root, "ocr", "train")
    found = time_source(store, open_view(root / "ocr", stage, None), 60.0)
    assert found["samples"] == len(store.keys)
    assert set(found["parts"]) == {"read", "fit", "encode"}
    assert min(part["cpu_ms"] for part in found["parts"].values()) > 0
    store.close()
    packs = time_stage(stage, 0.05)
    assert packs["packs"] >= 4
    assert packs["planned_packs_per_s"] > packs["packs_per_s"] > 0
