"""Checkpoint folders that cannot be used, and folders that are replaced."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vl.engine import process_groups
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train import checkpoint as train_checkpoint
from megatron_vl.train.build import build_model, prepare_training
from megatron_vl.train.checkpoint import (
    CheckpointError,
    full_tensors,
    latest,
    load_optimizer,
    load_weights,
    read_state,
    step_folder,
)
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train import jobs
from tests.train.conftest import QUICK, MakeConfig

# What a fused Mamba projection or convolution holds, in this order.
PIECES = ("z", "x", "B", "C", "dt")


@pytest.fixture
def weights_only(checkpoint: Path, tmp_path: Path) -> Path:
    """The same folder, saying that it holds no optimizer state."""
    folder = tmp_path / "step_000002"
    shutil.copytree(checkpoint, folder)
    state = (folder / "state.json").read_text()
    (folder / "state.json").write_text(state.replace('"optimizer": true', '"optimizer": false'))
    return folder


def load_into(stage: MakeConfig, folder: Path, *overrides: str) -> VisionLanguageModel:
    config = stage("stage1", *overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, seed=99)
    load_weights(folder, module, groups)
    return module


def test_what_is_loaded_is_what_is_stored(world: None, stage: MakeConfig, checkpoint: Path) -> None:
    """Every parameter under its own name; Mamba's fused ones are stored in pieces."""
    stored = full_tensors(checkpoint)
    for name, parameter in load_into(stage, checkpoint).named_parameters():
        names = [name] if name in stored else [f"{name}.{piece}" for piece in PIECES]
        whole = torch.cat([stored.pop(key) for key in names if key in stored])
        assert torch.equal(whole, parameter), name
    assert not stored


def test_a_checkpoint_of_the_torch_spec_lacks_some_extra_state(
    world: None, stage: MakeConfig, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where Transformer Engine is, its norms ask for a state that no other machine writes."""
    monkeypatch.setattr(
        train_checkpoint, "PLATFORM", replace(PLATFORM, has_transformer_engine=True)
    )
    stored = train_checkpoint._stored_objects
    absent = "language_model.decoder.layers.0.mixer.in_proj._extra_state/shard_0_1"
    assert absent in stored(checkpoint)
    asked: list[str] = []
    read = train_checkpoint._load

    def load(tree: dict[str, Any], folder: Path) -> dict[str, Any]:
        asked.extend(tree)
        return read(tree, folder)

    monkeypatch.setattr(
        train_checkpoint, "_stored_objects", lambda folder: stored(folder) - {absent}
    )
    monkeypatch.setattr(train_checkpoint, "_load", load)
    module = load_into(stage, checkpoint)
    state = [name for name in asked if name.endswith("_extra_state")]
    assert absent.partition("/")[0] not in state
    assert len(state) == len(stored(checkpoint)) - 1
    weight = full_tensors(checkpoint)["vision_model.class_token"]
    assert torch.equal(module.vision_model.class_token, weight)


def test_a_missing_folder_is_named_with_what_a_good_one_holds(
    world: None, stage: MakeConfig, tmp_path: Path
) -> None:
    missing = tmp_path / "step_000009"
    with pytest.raises(CheckpointError, match=r"step_000009 is no complete.*state\.json"):
        load_into(stage, missing)


def test_state_that_is_not_a_state_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    for text in ("{", "[]", '{"step": 3}'):
        (tmp_path / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            read_state(tmp_path)


def test_latest_counts_complete_folders_alone(checkpoint: Path, tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None
    for step in (2, 10, 9):
        folder = step_folder(tmp_path, step)
        folder.mkdir()
        shutil.copy(checkpoint / "state.json", folder)
    # Newer ones that were cut off: still being written, and without the file written last.
    partial = tmp_path / "step_000011.partial"
    partial.mkdir()
    shutil.copy(checkpoint / "state.json", partial)
    step_folder(tmp_path, 12).mkdir()
    assert latest(tmp_path) == step_folder(tmp_path, 10)


def test_weights_without_optimizer_state_cannot_be_gone_on_with(
    world: None, stage: MakeConfig, weights_only: Path
) -> None:
    config = stage("stage1")
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    load_weights(weights_only, module, groups)
    trainee = prepare_training(module, config, groups)
    with pytest.raises(CheckpointError, match=r"weights only.*carry\.optimizer=false") as raised:
        load_optimizer(weights_only, trainee)
    assert str(weights_only) in str(raised.value)


@pytest.mark.parametrize(
    "override",
    [
        "model.decoder.ffn_hidden_size=256",
        "model.decoder.pattern=M-M*-MM-M-",
        "model.decoder.pattern=M-M*-M",
        "model.encoder.num_layers=2",
        "model.padded_vocab_size=2176",
    ],
)
def test_a_model_of_other_sizes_is_refused(
    world: None, stage: MakeConfig, checkpoint: Path, override: str
) -> None:
    """Larger, smaller, deeper or shallower: never loaded in part."""
    with pytest.raises(CheckpointError) as raised:
        load_into(stage, checkpoint, override)
    said = str(raised.value)
    assert str(checkpoint) in said
    assert "model" in said
    assert len(said) < 1500


@pytest.mark.distributed
def test_saving_replaces_an_older_folder_of_that_name(
    ranks: RankPool, small_data: SmallData, checkpoint: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "step_000002"
    folder.mkdir()
    (folder / "leftover").write_text("from an older save")
    overrides = [small_data.override, *QUICK]
    ranks.run(1, jobs.train_and_save, LAPTOP / "stage1.yaml", overrides, 2, folder)
    assert not (folder / "leftover").exists()
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    first, second = full_tensors(checkpoint, optimizer=True), full_tensors(folder, optimizer=True)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.distributed
def test_a_last_pipeline_rank_that_learns_nothing_saves_and_goes_on(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Stage 0 trains the projector, which sits on the first rank alone."""
    file, folder = LAPTOP / "stage0.yaml", tmp_path / "step_000002"
    common = [small_data.override, *QUICK]
    pipeline = [*common, "parallel.pipeline=2"]
    straight = ranks.run(1, jobs.train_from_scratch, file, common, 4)[0]
    ranks.run(2, jobs.train_and_save, file, pipeline, 2, folder)
    for resumed in (
        *ranks.run(2, jobs.load_and_train, file, pipeline, folder, 2),
        *ranks.run(1, jobs.load_and_train, file, common, folder, 2),
    ):
        assert resumed.losses == pytest.approx(straight.losses[2:], rel=1e-6)
        assert resumed.grad_norms == pytest.approx(straight.grad_norms[2:], rel=1e-5)
