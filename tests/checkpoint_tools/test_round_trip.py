"""Published to stored and back, at any layout in between: bitwise."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import (
    CHECKSUMS_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    PublishedFolder,
)
from checkpoint_tools.tensor_bytes import sha256
from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.train.checkpoint import full_tensors
from tests.checkpoint_tools import rank_jobs
from tests.checkpoint_tools.conftest import SHARD_BYTES, Published, quiet
from tests.checkpoint_tools.published import (
    VOCABULARY,
    random_tensors,
    read_all,
    tiny_stage,
    write_published,
)
from tests.support.ranks import RankPool

CONSTANTS = {
    "vision_model.radio_model.summary_idxs",
    "vision_model.radio_model.input_conditioner.norm_mean",
    "vision_model.radio_model.input_conditioner.norm_std",
}
FP32 = ExportOptions("fp32", SHARD_BYTES)


def test_float32_comes_back_bit_by_bit(published: Published, release: Path) -> None:
    back = read_all(release)
    assert set(back) == set(published.tensors) | CONSTANTS
    for name, tensor in published.tensors.items():
        assert back[name].equal(tensor), name


@pytest.mark.parametrize(
    ("pattern", "dtype", "prefix"),
    [("*M-", torch.bfloat16, 8), ("MM", torch.float32, 3), ("-*M*", torch.bfloat16, 1)],
)
def test_other_models_and_types_come_back_too(
    published: Published, tmp_path: Path, pattern: str, dtype: torch.dtype, prefix: int
) -> None:
    stage = tiny_stage(pattern, prefix)
    tensors = {n: t.to(dtype) for n, t in random_tensors(stage.model, seed=len(pattern)).items()}
    folder = write_published(tmp_path / "a", stage, tensors, published.tokenizer, shards=3)
    import_folder(folder, tmp_path / "stage", None, 1, quiet)
    stored = full_tensors(tmp_path / "stage" / "checkpoints" / "step_000000")
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    options = ExportOptions("bf16" if dtype is torch.bfloat16 else "fp32", SHARD_BYTES)
    export(tmp_path / "stage", tmp_path / "b", options, quiet)
    back = read_all(tmp_path / "b")
    assert all(back[name].equal(tensor) for name, tensor in tensors.items())


def test_bf16_rounds_every_weight_once(
    published: Published, stage_folder: Path, tmp_path: Path
) -> None:
    export(stage_folder, tmp_path / "out", ExportOptions("bf16", SHARD_BYTES), quiet)
    back = read_all(tmp_path / "out")
    for name, tensor in published.tensors.items():
        assert back[name].equal(tensor.bfloat16()), name
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["torch_dtype"] == "bfloat16"


def test_the_model_section_comes_back(published: Published) -> None:
    folder = PublishedFolder(published.folder)
    found, expected = model_of(folder.config), published.stage.model
    found.decoder.init_std = expected.decoder.init_std
    assert found == expected


def test_index_checksums_and_shards_agree(release: Path) -> None:
    index = json.loads((release / INDEX_FILE).read_text())
    recorded = json.loads((release / CHECKSUMS_FILE).read_text())
    back = read_all(release)
    files = set(index["weight_map"].values())
    assert files == {path.name for path in release.glob("*.safetensors")}
    assert len(files) > 3
    assert set(index["weight_map"]) == set(recorded["tensors"]) == set(back)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in back.values())
    for name, tensor in back.items():
        assert recorded["tensors"][name]["sha256"] == sha256(tensor)
        assert recorded["tensors"][name]["file"] == index["weight_map"][name]
    others = {p.name for p in release.iterdir()} - files - {CHECKSUMS_FILE}
    assert set(recorded["files"]) == others
    assert all((release / file).stat().st_size < SHARD_BYTES * 1.1 for file in files)


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        [],
        ["parallel.tensor=2"],
        ["parallel.pipeline=2"],
        ["parallel.tensor=2", "precision=bf16"],
    ],
    ids=lambda layout: "+".join(layout) or "one",
)
def test_ranks_load_an_import_at_any_layout(
    ranks: RankPool, stage_folder: Path, layout: list[str]
) -> None:
    size = 2 ** sum(word.startswith("parallel") for word in layout)
    answers = ranks.run(size, rank_jobs.compare_shards, stage_folder, layout)
    for held, wrong in answers:
        assert held > 20
        assert not wrong


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("tensor", "pipeline"),
    [
        (2, 2),
        pytest.param(1, 1, marks=pytest.mark.slow),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 1, marks=pytest.mark.slow),
    ],
)
def test_loaded_and_saved_at_another_layout_it_exports_the_same_bytes(
    ranks: RankPool, stage_folder: Path, release: Path, tmp_path: Path, tensor: int, pipeline: int
) -> None:
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(stage_folder / "config.yaml", again)
    shutil.copytree(stage_folder / "tokenizer", again / "tokenizer")
    layout = [f"parallel.tensor={tensor}", f"parallel.pipeline={pipeline}"]
    folder = again / "checkpoints" / "step_000000"
    ranks.run(tensor * pipeline, rank_jobs.load_and_save, stage_folder, layout, folder)
    export(again, tmp_path / "out", FP32, quiet)
    for path in release.glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_padding_rows_stay_behind_unless_asked_for(published: Published, tmp_path: Path) -> None:
    """Imported into a stage with a larger vocabulary, as the 12B recipe has."""
    config = load_stage_text(published, tmp_path, padded=VOCABULARY + 24)
    import_folder(published.folder, tmp_path / "stage", config, 5, quiet)
    export(tmp_path / "stage", tmp_path / "plain", FP32, quiet)
    export(
        tmp_path / "stage",
        tmp_path / "padded",
        ExportOptions("fp32", SHARD_BYTES, keep_padding=True),
        quiet,
    )
    plain, padded = read_all(tmp_path / "plain"), read_all(tmp_path / "padded")
    for name in ("language_model.lm_head.weight", "language_model.backbone.embeddings.weight"):
        assert plain[name].equal(published.tensors[name])
        assert padded[name].shape[0] == VOCABULARY + 24
        assert padded[name][:VOCABULARY].equal(plain[name])
        assert float(padded[name][VOCABULARY:].abs().min()) > 0
    origin = json.loads((tmp_path / "stage" / "origin.json").read_text())
    assert "rows 512 to 535" in origin["drawn"][0]
    again = tmp_path / "again"
    import_folder(published.folder, again, config, 5, quiet)
    one, other = (
        full_tensors(p / "checkpoints" / "step_000000") for p in (tmp_path / "stage", again)
    )
    assert all(one[name].equal(other[name]) for name in one)


def load_stage_text(published: Published, folder: Path, padded: int) -> Path:
    """A stage file of the published model with more vocabulary rows."""
    stage = copy.deepcopy(published.stage)
    stage.model.padded_vocab_size = padded
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(stage))
    assert load_stage(path).model.padded_vocab_size == padded
    return path
