"""Quantized releases beside the tools that invented their formats.

Model Optimizer, compressed-tensors and llm-compressor's arithmetic are no dependencies of this
project; each test says which package it lacks. In an environment of their own beside this one:

    pip install --no-deps --target F compressed-tensors==0.20.0 nvidia-modelopt==0.47.0 ...
    PYTHONPATH=F pytest tests/checkpoint_tools/test_other_tools.py
"""

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoint_tools.calibrate import calibrate
from checkpoint_tools.certificate import prompts
from checkpoint_tools.decode import fake_quantized, input_scale
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.names import Rule
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.quantized_layout import (
    COMPRESSED,
    MODELOPT,
    NVFP4,
    Quantization,
    applies,
    described,
)
from checkpoint_tools.reference import quantized_linears, reference_model
from checkpoint_tools.stage_source import open_stage
from megatron_vl.config.schema import Precision
from megatron_vl.train.calibrate import exchanged_inputs, pack_logits
from tests.checkpoint_tools.conftest import SHARD_BYTES, quiet
from tests.checkpoint_tools.published import read_all

MIXER = "language_model.backbone.layers.{}.mixer."
TOGETHER = [
    [MIXER.format(3) + f"{name}_proj" for name in "qkv"],
    [MIXER.format(3) + "o_proj"],
    [MIXER.format(0) + "in_proj"],
    [MIXER.format(1) + "down_proj"],
]
"""Modules that share an input, from every kind of layer."""
Exports = dict[tuple[str, str], Path]


def package(name: str) -> Any:
    return pytest.importorskip(name, reason=f"{name} is not installed: see the head of this file")


@pytest.fixture(scope="module")
def exports(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Exports:
    """Every format and layout of the served stage, and its BF16 release."""
    base = tmp_path_factory.mktemp("tools")
    amax = base / "amax.safetensors"
    calibrate(served, amax, quiet, 2)
    made = {}
    for kind, layout in (
        ("bf16", MODELOPT),
        *((kind, layout) for kind in ("fp8", "nvfp4") for layout in (MODELOPT, COMPRESSED)),
    ):
        made[kind, layout] = base / f"{kind}_{layout}"
        options = ExportOptions(kind, SHARD_BYTES, layout=layout, amax=amax)
        export(served, made[kind, layout], options, quiet)
    return made


def test_modelopt_makes_the_same_bytes(request: pytest.FixtureRequest) -> None:
    package("modelopt")
    from modelopt.torch.quantization.qtensor import FP8QTensor, NVFP4QTensor

    exports: Exports = request.getfixturevalue("exports")
    weights = read_all(exports["bf16", MODELOPT])
    fp8, nvfp4 = (read_all(exports[kind, MODELOPT]) for kind in ("fp8", "nvfp4"))
    for modules in TOGETHER:
        fused = torch.cat([weights[module + ".weight"] for module in modules])
        shared = NVFP4QTensor.get_weights_scaling_factor_2(fused)
        for module in modules:
            weight = weights[module + ".weight"]
            made, scale = FP8QTensor.quantize(weight, weight.abs().max().float() / 448.0)
            assert same(fp8[module + ".weight"], made._quantized_data), module
            assert float(fp8[module + ".weight_scale"]) == float(scale)
            packed, blocks, whole = NVFP4QTensor.quantize(
                weight, 16, weights_scaling_factor_2=shared
            )
            assert same(nvfp4[module + ".weight"], packed._quantized_data), module
            assert same(nvfp4[module + ".weight_scale"], blocks), module
            assert float(nvfp4[module + ".weight_scale_2"]) == float(whole)


def test_compressed_tensors_makes_the_same_bytes(request: pytest.FixtureRequest) -> None:
    """The statistics llm-compressor feeds it are the smallest and largest weights, in BF16."""
    package("compressed_tensors")
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    exports: Exports = request.getfixturevalue("exports")
    weights = read_all(exports["bf16", MODELOPT])
    fp8, nvfp4 = (read_all(exports[kind, COMPRESSED]) for kind in ("fp8", "nvfp4"))
    tensor = QuantizationArgs(num_bits=8, type="float", strategy="tensor")
    group = QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    for modules in TOGETHER:
        fused = torch.cat([weights[module + ".weight"] for module in modules])
        whole = generate_gparam(fused.min(), fused.max())
        for module in modules:
            weight = weights[module + ".weight"]
            scale, zero = calculate_qparams(weight.min(), weight.max(), tensor)
            made = quantize(weight, scale, zero, tensor, dtype=torch.float8_e4m3fn)
            assert same(fp8[module + ".weight"], made), module
            assert float(fp8[module + ".weight_scale"]) == float(scale)
            blocks = weight.unflatten(1, (-1, 16))
            scales, zeros = calculate_qparams(blocks.amin(-1), blocks.amax(-1), group, whole)
            codes = quantize(weight, scales, zeros, group, global_scale=whole)
            assert same(nvfp4[module + ".weight_packed"], pack_fp4_to_uint8(codes)), module
            assert same(nvfp4[module + ".weight_scale"], scales.to(torch.float8_e4m3fn)), module
            assert float(nvfp4[module + ".weight_global_scale"]) == float(whole)


def same(one: Tensor, other: Tensor) -> bool:
    flat = (t.contiguous().reshape(-1).view(torch.uint8) for t in (one, other))
    return one.shape == other.shape and torch.equal(*flat)


@pytest.mark.parametrize("kind", ["fp8", "nvfp4"])
@torch.no_grad()
def test_transformers_reloads_what_the_fake_quantized_model_computes(
    request: pytest.FixtureRequest, served: Path, offline: None, kind: str
) -> None:
    """compressed-tensors layout through the shipped code, beside this project's model with decoded
    weights and quantized inputs; weights alone would differ far more."""
    package("compressed_tensors")
    import transformers

    exports: Exports = request.getfixturevalue("exports")
    folder, source = exports[kind, COMPRESSED], open_stage(served)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    ).eval()
    if kind == "nvfp4":  # the first pass decompresses the weights, to bfloat16 whatever is asked
        with contextlib.suppress(RuntimeError):
            model(input_ids=torch.tensor([[1]]))
        for module in model.modules():
            if getattr(module, "quantization_scheme", None) is not None:
                module.weight.data = module.weight.data.float()
    processor = transformers.AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    config = prompts.without_pruning(source.config)
    asked = next(p for p in prompts.make_prompts(config, 8) if p.kind == "image")
    found = model(**prompts.theirs(processor, config, asked)).logits[0].float()
    pack = prompts.ours(config, asked)
    quantized = our_logits(folder, served, pack, inputs=True)
    weights_alone = our_logits(folder, served, pack, inputs=False)
    error = float((found - quantized).norm() / quantized.norm())
    other = float((found - weights_alone).norm() / quantized.norm())
    assert error < 0.02 * other, (error, other)
    assert inputs_differ(model, folder) < 1e-6


def inputs_differ(model: Any, folder: Path) -> float:
    """Between a quantized input in float32 as compressed-tensors computes it and as we do."""
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    published, module = PublishedFolder(folder), MIXER.format(0) + "out_proj"
    chosen = described(published.config)
    assert chosen is not None
    held = {n: published.read(n) for n in published.tensors if n.startswith(module + ".input")}
    linear = model.language_model.model.layers[0].mixer.out_proj
    given = torch.randn(7, linear.in_features, generator=torch.Generator().manual_seed(1))
    theirs = forward_quantize(linear, given, "input", linear.quantization_scheme.input_activations)
    ours = fake_quantized(given, input_scale(held, module, chosen), chosen)
    assert float((ours - given).norm() / given.norm()) > 1e-2
    return float((theirs.float() - ours).norm() / ours.norm())


def our_logits(folder: Path, stage: Path, pack: Any, *, inputs: bool) -> Tensor:
    """This project's model with the release's decoded weights, rounded as transformers holds them.

    A rounding more or less gives some inputs of the next layer another code, and so on.
    """
    from checkpoint_tools.certificate.subject import open_subject

    published, source = PublishedFolder(folder), open_stage(stage)
    subject = open_subject(published, source)
    chosen = described(published.config)
    assert isinstance(chosen, Quantization)
    scales = {}
    for name, rule in quantized_linears(source.table).items():
        module = rule.published[0].name.removesuffix(".weight")
        held = {n: published.read(n) for n in published.tensors if n.startswith(module + ".input")}
        scales[name] = input_scale(held, module, chosen)

    def exchange(name: str, given: Tensor) -> Tensor:
        return fake_quantized(given, scales[name], chosen)

    def weights(rule: Rule, stored: Sequence[Tensor]) -> list[Tensor]:
        narrow = torch.bfloat16 if applies(rule) and chosen.format == NVFP4 else torch.float32
        return [tensor.to(narrow) for tensor in subject.persisted(rule, stored)]

    with (
        reference_model(source, weights, Precision.fp32) as module,
        exchanged_inputs(module, scales if inputs else (), exchange),
    ):
        return pack_logits(module, pack)[:, : source.config.model.vocab_size]
