"""A decoder and an encoder, as they are released, to a starting checkpoint."""

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from checkpoint_tools.assemble import assemble
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import explain
from checkpoint_tools.explain_text import explain_text
from checkpoint_tools.names import NamesError
from checkpoint_tools.published_config import TokenIds, published_config
from megatron_vl.config.load import to_yaml
from megatron_vl.config.schema import Precision, StageConfig
from megatron_vl.infer.model import open_model
from megatron_vl.model.initialize import draw_tensor
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.receipt import read_receipt
from megatron_vl.train.checkpoint import full_tensors
from tests.checkpoint_tools.conftest import quiet
from tests.checkpoint_tools.published import tiny_stage
from tests.support.packs import pack_of_documents, run_pack, text_document

RELEASED_ROWS, RELEASED_PREFIX = 500, 10
EMBEDDING = "language_model.embedding.word_embeddings.weight"
OUTPUT = "language_model.output_layer.weight"


@pytest.fixture(scope="module")
def stage() -> StageConfig:
    config = tiny_stage()
    config.name = "init"
    config.model.padded_vocab_size = 528
    config.train.seed = 77
    config.precision = Precision.fp32
    return config


@pytest.fixture(scope="module")
def like(stage: StageConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "init.yaml"
    path.write_text(to_yaml(stage))
    return path


@pytest.fixture(scope="module")
def released(stage: StageConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Random models of transformers' own classes, saved by transformers."""
    torch.manual_seed(4)
    base = tmp_path_factory.mktemp("released")
    ids = TokenIds(begin=1, end_of_turn=12, pad=0, image=502, video=511)
    config = published_config(stage, RELEASED_ROWS, "float32", ids)
    text = transformers.NemotronHConfig(**config["llm_config"])
    vision = config["vision_config"]
    radio = transformers.RadioConfig(
        hidden_size=vision["hidden_size"],
        num_hidden_layers=vision["num_hidden_layers"],
        num_attention_heads=vision["num_attention_heads"],
        mlp_ratio=vision["intermediate_size"] / vision["hidden_size"],
        patch_size=vision["patch_size"],
        max_img_size=vision["args"]["cpe_max_size"],
        num_cls_tokens=4,
        num_registers=RELEASED_PREFIX - 4,
    )
    decoder, encoder = transformers.NemotronHForCausalLM(text), transformers.RadioModel(radio)
    for model, name in ((decoder, "decoder"), (encoder, "encoder")):
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "layer_scale" not in parameter_name:
                    parameter.add_(torch.randn(parameter.shape), alpha=0.03)
        model.save_pretrained(base / name, max_shard_size="200KB")
    return base / "decoder", base / "encoder"


@pytest.fixture(scope="module")
def assembled(
    released: tuple[Path, Path], like: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out = tmp_path_factory.mktemp("run") / "stages" / "00_init"
    assemble(*released, out, like, quiet)
    return out


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return full_tensors(folder / "checkpoints" / "step_000000")


def test_released_weights_are_in_place(released: tuple[Path, Path], assembled: Path) -> None:
    found = tensors(assembled)
    decoder = transformers.NemotronHForCausalLM.from_pretrained(released[0])
    encoder = transformers.RadioModel.from_pretrained(released[1])
    assert found[EMBEDDING][:RELEASED_ROWS].equal(decoder.model.embeddings.weight)
    assert found[OUTPUT][:RELEASED_ROWS].equal(decoder.lm_head.weight)
    layer = found["language_model.decoder.layers.1.mlp.linear_fc1.weight"]
    assert layer.equal(decoder.model.layers[1].mixer.up_proj.weight)
    released_prefix = encoder.embeddings.cls_register_token
    prefix = found["vision_model.class_token"]
    assert prefix.shape == (16, 48)
    assert prefix[16 - RELEASED_PREFIX :].equal(released_prefix)


@torch.no_grad()
def test_the_decoder_answers_as_released(released: tuple[Path, Path], assembled: Path) -> None:
    decoder = transformers.NemotronHForCausalLM.from_pretrained(released[0]).eval()
    tokens = torch.randint(0, RELEASED_ROWS, (70,), generator=torch.Generator().manual_seed(2))
    with open_model(assembled) as model:
        pack = pack_of_documents(model.config, [text_document(tokens.tolist())], [])
        ours = run_pack(model.module, pack)[: len(tokens), :RELEASED_ROWS]
    theirs = decoder(tokens.unsqueeze(0)).logits[0]
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-4


def test_what_no_release_has_is_drawn_as_said(
    stage: StageConfig, released: tuple[Path, Path], assembled: Path
) -> None:
    found = tensors(assembled)
    for name in ("linear_fc1.weight", "linear_fc2.weight", "linear_fc1.layer_norm_weight"):
        name = f"vision_projection.encoder.{name}"
        drawn = draw_tensor(name, tuple(found[name].shape), stage.model, stage.train.seed)
        assert found[name].equal(drawn.to(found[name].dtype)), name
    fc1 = found["vision_projection.encoder.linear_fc1.weight"].float()
    assert math.isclose(float(fc1.std()), stage.model.projector.init_std, rel_tol=0.05)
    for name in (EMBEDDING, OUTPUT):
        table = found[name].float()
        new = table[RELEASED_ROWS:] - table[:RELEASED_ROWS].mean(0)
        assert len(new) == 28
        assert math.isclose(float(new.std()), stage.model.decoder.init_std, rel_tol=0.1)
    assert not found[EMBEDDING][RELEASED_ROWS:].equal(found[OUTPUT][RELEASED_ROWS:])
    fresh = found["vision_model.class_token"][: 16 - RELEASED_PREFIX].float()
    assert math.isclose(float(fresh.std()), stage.model.encoder.init_std, rel_tol=0.2)


def test_the_stage_folder_says_what_it_is(assembled: Path, released: tuple[Path, Path]) -> None:
    receipt = read_receipt(assembled / "receipt.json")
    assert receipt.done
    assert receipt.stage == "init"
    assert receipt.checkpoint is not None
    assert checkpoint_digest(assembled / receipt.checkpoint.path) == receipt.checkpoint.digest
    said = explain_text(explain(assembled, verify=True))
    place = released[0].parent.name
    assert f"assemble: decoder from {place}/decoder, encoder from {place}/encoder" in said
    assert "drawn: projector: normal with 0.02, norm at 1, seed 77" in said
    assert "rows 500 to 527" in said
    assert "prefix tokens 0 to 5, in front of the 10 released: normal with 0.02, seed 77" in said


def test_the_same_seed_gives_the_same_checkpoint_and_another_does_not(
    stage: StageConfig, released: tuple[Path, Path], like: Path, assembled: Path, tmp_path: Path
) -> None:
    assemble(*released, tmp_path / "same", like, quiet)
    other_stage = copy.deepcopy(stage)
    other_stage.train.seed = 78
    (tmp_path / "init.yaml").write_text(to_yaml(other_stage))
    assemble(*released, tmp_path / "other", tmp_path / "init.yaml", quiet)
    first, same, other = (tensors(p) for p in (assembled, tmp_path / "same", tmp_path / "other"))
    assert all(first[name].equal(same[name]) for name in first)
    changed = {name for name in first if not first[name].equal(other[name])}
    assert changed == {
        EMBEDDING,
        OUTPUT,
        "vision_model.class_token",
        "vision_projection.encoder.linear_fc1.weight",
        "vision_projection.encoder.linear_fc2.weight",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 128}, "decoder.hidden_size is 64, published is 128"),
        ({"n_groups": 4}, "decoder.mamba_num_groups is 2, published is 4"),
        ({"layer_norm_epsilon": 1e-6}, "decoder.norm_epsilon is 1e-05, published is 1e-06"),
    ],
)
def test_releases_of_other_sizes_are_refused(
    released: tuple[Path, Path], like: Path, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    """All of them by name, before a byte is read; an epsilon has no shape to be caught by."""
    decoder = tmp_path / "decoder"
    shutil.copytree(released[0], decoder)
    config = json.loads((decoder / "config.json").read_text())
    (decoder / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ConversionError) as raised:
        assemble(decoder, released[1], tmp_path / "out", like, quiet)
    assert message in str(raised.value)


def test_folders_given_the_wrong_way_round(
    released: tuple[Path, Path], like: Path, tmp_path: Path
) -> None:
    with pytest.raises((ConversionError, NamesError), match="lacks"):
        assemble(released[1], released[0], tmp_path / "out", like, quiet)
