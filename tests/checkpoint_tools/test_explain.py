"""What is told about trained stages, and what changed between two of them."""

import copy
from pathlib import Path

import pytest
import torch

from checkpoint_tools.diff import diff, diff_text
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import explain
from checkpoint_tools.explain_text import explain_text
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.lineage import Ancestor, describe_origin, longest_sequence
from checkpoint_tools.published_config import TokenIds, published_config
from tests.checkpoint_tools.conftest import Published, quiet
from tests.checkpoint_tools.published import random_tensors, write_published
from tests.conftest import ShortRun


def test_a_run_explains_itself_and_so_does_its_release(short_run: ShortRun, tmp_path: Path) -> None:
    """Stages 0-4 of the laptop recipe, three steps each, trained by `mvl submit`."""
    known = explain(short_run.path, verify=True)
    assert [stage["stage"] for stage in known["lineage"]] == [
        "init", "stage0", "stage1", "stage2", "stage3", "stage4",
    ]  # fmt: skip
    assembled = "mvl checkpoint assemble: decoder from released/decoder, encoder from "
    assembled += "released/encoder"
    assert known["lineage"][0]["from"] == assembled
    assert known["lineage"][1]["trainable"] == ["projector"]
    assert known["lineage"][2]["packs"] == 6
    assert known["lineage"][2]["tokens"] > 100
    assert known["training_state"]["count"] > 100
    assert known["digest"]
    said = explain_text(known)
    assert "stage0 (done) from init: 3 steps on 6 packs of 512" in said
    out = tmp_path / "release"
    export(short_run.path, out, ExportOptions(check_digest=False), quiet)
    released = explain(out, verify=True)
    assert released["lineage"] == known["lineage"]
    assert released["digest"] == known["digest"]
    card = (out / "README.md").read_text()
    assert known["digest"] in card
    assert "| stage3 | stage2 |" in card
    assert str(short_run.path) not in card
    stages = short_run.path / "stages"
    found = diff(stages / "00_init", stages / "01_stage0")
    changed = {change.module for change in found.changes if change.relative}
    assert changed == {
        "vision_projection.encoder.linear_fc1",
        "vision_projection.encoder.linear_fc2",
    }
    assert found.state["step"] == (0, 3)
    assert "2 of 51 modules differ" in diff_text(found)
    later = diff(stages / "01_stage0", stages / "02_stage1")
    assert later.config["train.trainable"][0] == ["projector"]
    assert later.state["stage"] == ("stage0", "stage1")


def test_change_is_the_norm_of_the_difference(published: Published, tmp_path: Path) -> None:
    """One scaled tensor, one moved number: found, measured, and nothing else."""
    moved = dict(published.tensors)
    scaled = "language_model.backbone.layers.5.mixer.in_proj.weight"
    touched = "vision_model.radio_model.model.blocks.1.attn.qkv.weight"
    moved[scaled] = moved[scaled] * 1.25
    moved[touched] = moved[touched].clone()
    moved[touched][5, 3] += 0.5
    other = write_published(tmp_path / "other", published.stage, moved, published.tokenizer)
    found = diff(published.folder, other)
    changed = {change.module: change for change in found.changes if change.relative}
    assert set(changed) == {
        "language_model.decoder.layers.5.mixer.in_proj",
        "vision_model.decoder.layers.1.self_attention.linear_qkv",
    }
    norm = published.tensors["language_model.backbone.layers.5.norm.weight"]
    whole = torch.cat([published.tensors[scaled].flatten(), norm]).double().norm()
    expected = 0.25 * published.tensors[scaled].double().norm() / whole
    in_proj = changed["language_model.decoder.layers.5.mixer.in_proj"]
    assert in_proj.relative == pytest.approx(float(expected), rel=1e-6)
    qkv = changed["vision_model.decoder.layers.1.self_attention.linear_qkv"]
    assert qkv.largest == pytest.approx(0.5, rel=1e-5)


def test_models_of_other_sizes_are_told_apart(published: Published, tmp_path: Path) -> None:
    stage = copy.deepcopy(published.stage)
    stage.model.projector.ffn_hidden_size = 96
    folder = write_published(
        tmp_path / "other", stage, random_tensors(stage.model), published.tokenizer
    )
    found = diff(published.folder, folder)
    assert found.config == {"model.projector.ffn_hidden_size": (80, 96)}
    assert sorted(found.only_a) == sorted(found.only_b) == ["mlp1.1.weight", "mlp1.3.weight"]


def test_what_has_no_record_cannot_be_verified(published: Published, tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="records no hashes"):
        explain(published.folder, verify=True)
    assert "unknown" in explain_text(explain(published.folder))
    stage = tmp_path / "stage"
    import_folder(published.folder, stage, None, 1, quiet)
    (stage / "receipt.json").unlink()
    with pytest.raises(ConversionError, match="no receipt names"):
        explain(stage, verify=True)


def test_a_short_last_stage_does_not_shorten_what_the_model_reads(published: Published) -> None:
    stages = []
    for length in (512, 4096, 1024):
        config = copy.deepcopy(published.stage)
        config.data.sequence_length = length
        stages.append(Ancestor("stage", None, config, None, None))
    assert longest_sequence(stages) == 4096
    ids = TokenIds(1, 12, 0, 502, 511)
    made = published_config(stages[-1].config, 512, "bfloat16", ids, longest_sequence(stages))
    assert made["max_sequence_length"] == made["llm_config"]["max_position_embeddings"] == 4096


def test_a_source_named_after_its_part_alone_is_told_with_its_parent() -> None:
    origin = {"made_by": "assemble", "from": {"decoder": "/a/nemo/decoder", "encoder": "/b/RADIO"}}
    assert describe_origin(origin) == "assemble: decoder from nemo/decoder, encoder from RADIO"
