"""Exported folders opened again: their answers against the checkpoint's."""

import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.diff import diff, diff_text
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NamesError
from checkpoint_tools.open_export import open_export
from checkpoint_tools.quantized_layout import INPUT_AMAX, LAYOUTS, Calibration, quantized_modules
from checkpoint_tools.reference import parameter_of, quantized_linears
from checkpoint_tools.stage_source import open_stage
from launch.infer_commands import open_any
from megatron_vl.config.load import to_yaml
from megatron_vl.infer.decode import Options, prompt_of, respond
from megatron_vl.infer.model import OpenModel
from megatron_vl.infer.question import Question
from megatron_vl.train.calibrate import exchanged_inputs
from tests.checkpoint_tools.conftest import SHARD_BYTES, Published, quiet
from tests.checkpoint_tools.published import read_all
from tests.checkpoint_tools.test_quantized import E2M1, decoded

pytestmark = pytest.mark.distributed


def png(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (90, 61, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


TEXT = Question([{"role": "user", "content": "bad cab gaffe?"}], [])
PICTURES = Question(
    [
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "a"},
                {"type": "text", "text": "bad or"},
                {"type": "image", "image": "b"},
            ],
        }
    ],
    [png(1), png(2)],
)


def logits(model: OpenModel) -> Tensor:
    """After both questions."""
    return torch.cat([model.last_logits(prompt_of(model, q, False), []) for q in (TEXT, PICTURES)])


def answers(model: OpenModel) -> list[list[int]]:
    return [respond(model, q, Options(max_new_tokens=32)).tokens for q in (TEXT, PICTURES)]


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


def test_a_checkpoint_and_its_export_say_the_same(stage_folder: Path, release: Path) -> None:
    with open_any(stage_folder) as model:
        assert model.origin.startswith("checkpoint ")
        expected, said = logits(model), answers(model)
    with open_any(release) as model:
        assert model.origin == (f"exported folder {release}: float32 weights, computed in fp32")
        assert torch.equal(logits(model), expected)
        assert answers(model) == said
    assert len(set(said[0])) > 3
    assert said[0] != said[1]


def test_a_bf16_export_is_the_rounded_checkpoint(stage_folder: Path, tmp_path: Path) -> None:
    export(stage_folder, tmp_path / "out", ExportOptions("bf16", SHARD_BYTES), quiet)
    with open_any(stage_folder) as model, torch.no_grad():
        unrounded = logits(model)
        for parameter in model.module.parameters():
            parameter.copy_(parameter.bfloat16())
        expected = logits(model)
    with open_export(tmp_path / "out") as model:
        assert relative(logits(model), expected) < 1e-6
    assert relative(expected, unrounded) > 1e-3


@pytest.fixture(scope="module")
def amax(
    stage_folder: Path, published: Published, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Limits that some inputs go beyond."""
    generator = torch.Generator().manual_seed(8)
    modules = quantized_modules(name_table(published.stage.model).rules)
    held = {m + INPUT_AMAX: 6 + 4 * torch.rand((), generator=generator) for m in modules}
    path = tmp_path_factory.mktemp("opened") / "amax.safetensors"
    said = Calibration(open_stage(stage_folder).digest, 1, 1, 1)
    save_file(held, path, metadata=said.metadata())
    return path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_a_quantized_export_computes_what_its_numbers_say(
    stage_folder: Path, amax: Path, tmp_path: Path, kind: str, layout: str
) -> None:
    """Weights and inputs by a few lines that share nothing with the tools."""
    out = tmp_path / "out"
    export(stage_folder, out, ExportOptions(kind, SHARD_BYTES, layout=layout, amax=amax), quiet)
    with open_export(out) as model:
        assert f"{kind} ({layout}) weights" in model.origin
        ours = logits(model)
        assert answers(model) == answers(model)
    tensors = read_all(out)
    weights = decoded(tensors)
    source = open_stage(stage_folder)
    limits: dict[str, Tensor] = {}
    with open_any(stage_folder) as model, torch.no_grad():
        bf16 = logits(model)
        parameters = dict(model.module.named_parameters())
        for rule in source.table.rules:
            pieces = rule.to_stored([weights[slot.name] for slot in rule.published])
            parameters[parameter_of(rule)].copy_(torch.cat(list(pieces)))
        weights_only = logits(model)
        for name, rule in quantized_linears(source.table).items():
            modules = [slot.name.removesuffix(".weight") for slot in rule.published]
            limits[name] = torch.stack([largest_input(tensors, m, kind) for m in modules]).max()
        seen = nearest_fp8 if kind == "fp8" else nearest_nvfp4
        with exchanged_inputs(model.module, limits, lambda name, x: seen(x, limits[name])):
            expected = logits(model)
    assert relative(ours, expected) < 5e-3
    assert relative(ours, weights_only) > 3 * relative(ours, expected)
    assert relative(ours, bf16) > 1e-3


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
def test_transformers_is_kept_from_taking_codes_for_weights(
    stage_folder: Path, amax: Path, tmp_path: Path, offline: None, kind: str
) -> None:
    out = tmp_path / "out"
    export(stage_folder, out, ExportOptions(kind, SHARD_BYTES, amax=amax), quiet)
    with pytest.raises(ValueError, match=r"ModelOpt's layout.*--layout compressed_tensors"):
        transformers.AutoModelForImageTextToText.from_pretrained(out, trust_remote_code=True)
    assert "AutoModelForImageTextToText" not in (out / "README.md").read_text()


def test_diff_reads_quantized_weights_as_the_numbers_they_stand_for(
    stage_folder: Path, amax: Path, tmp_path: Path
) -> None:
    for kind in ("bf16", "nvfp4"):
        export(stage_folder, tmp_path / kind, ExportOptions(kind, SHARD_BYTES, amax=amax), quiet)
    found = diff(tmp_path / "bf16", tmp_path / "nvfp4")
    assert found.config == {"weights": ("bfloat16", "nvfp4 (modelopt)")}
    assert found.state == {}
    assert not found.only_a
    assert not found.only_b
    before, after = read_all(tmp_path / "bf16"), decoded(read_all(tmp_path / "nvfp4"))
    moved = {c.module: c.relative for c in found.changes if c.relative}
    linears = quantized_linears(open_stage(stage_folder).table)
    assert {name.removesuffix(".weight") for name in linears} == set(moved)
    assert [part.module for part in found.parts if part.relative] == ["decoder"]
    name = "language_model.backbone.layers.0.mixer.out_proj.weight"
    old, new = before[name].double(), after[name].double()
    expected = float((new - old).norm() / old.norm())
    module = "language_model.decoder.layers.0.mixer.out_proj"
    assert moved[module] == pytest.approx(expected, rel=1e-6)
    said = diff_text(found)
    assert "weights: bfloat16 -> nvfp4 (modelopt)" in said
    assert max(map(len, re.findall("#+", said))) == 24
    assert diff(stage_folder, tmp_path / "nvfp4").state == {}


def nearest_fp8(x: Tensor, largest: Tensor) -> Tensor:
    step = largest / 448
    return (x / step).clamp(-448, 448).to(torch.float8_e4m3fn).float() * step


def nearest_nvfp4(x: Tensor, largest: Tensor) -> Tensor:
    step = largest / (6 * 448)
    blocks = x.unflatten(-1, (-1, 16))
    scale = (blocks.abs().amax(-1, keepdim=True) / 6 / step).clamp(2**-9, 448)
    scale = scale.to(torch.float8_e4m3fn).float() * step
    nearest = (blocks.unsqueeze(-1) / scale.unsqueeze(-1) - E2M1).abs().argmin(-1)
    return (E2M1[nearest] * scale).flatten(-2)


def largest_input(tensors: dict[str, Tensor], module: str, kind: str) -> Tensor:
    """What the stored input scale says, in each layout's own terms."""
    if module + ".input_global_scale" in tensors:
        return 6 * 448 / tensors[module + ".input_global_scale"].float().reshape(())
    top = 448 if kind == "fp8" else 6 * 448
    return top * tensors[module + ".input_scale"].float().reshape(())


def test_a_stage_file_brings_its_data(published: Published, release: Path, tmp_path: Path) -> None:
    like = tmp_path / "like.yaml"
    like.write_text(to_yaml(published.stage))
    with open_any(release, str(like)) as model:
        assert model.config.data.sequence_length == 512
        assert model.config.data.root == "nowhere"
        assert model.tokenizer.vocab_size == 512


def test_a_stage_of_another_model_is_refused(
    published: Published, release: Path, stage_folder: Path, tmp_path: Path
) -> None:
    like = tmp_path / "like.yaml"
    like.write_text(to_yaml(published.stage).replace("ffn_hidden_size: 144", "ffn_hidden_size: 96"))
    with pytest.raises(ConversionError, match=r"decoder.ffn_hidden_size is 96, published is 144"):
        open_any(release, str(like)).__enter__()
    with pytest.raises(ValueError, match="a checkpoint brings its own stage"):
        open_any(stage_folder, str(like)).__enter__()


def test_an_incomplete_folder_is_refused(release: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(release, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["projector_hidden_size"] += 8
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(NamesError, match=r"mlp1\.1\.weight"):
        open_any(broken).__enter__()
    (broken / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer"):
        open_any(broken).__enter__()
