"""FP8 and NVFP4 releases, decoded by a few lines that share nothing with the quantizer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools import quantize
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import explain
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NamesError
from checkpoint_tools.published_folder import CONFIG_FILE
from checkpoint_tools.quantized_layout import (
    INPUT_AMAX,
    LAYOUTS,
    Calibration,
    quantized_modules,
)
from checkpoint_tools.stage_source import open_stage
from tests.checkpoint_tools.conftest import SHARD_BYTES, Published, quiet
from tests.checkpoint_tools.published import read_all, tiny_stage

FORMATS = ("fp8", "nvfp4")
E4M3_NAME = "torch.float8_e4m3fn"
LAYER = "language_model.backbone.layers.{}.mixer."
QKV = [LAYER.format(3) + f"{name}_proj" for name in "qkv"]
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6])


@pytest.fixture(scope="module")
def amax(
    published: Published, stage_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    generator = torch.Generator().manual_seed(8)
    modules = quantized_modules(name_table(published.stage.model).rules)
    held = {m + INPUT_AMAX: 1 + 9 * torch.rand((), generator=generator) for m in modules}
    path = tmp_path_factory.mktemp("amax") / "amax.safetensors"
    save_file(held, path, metadata=measured_on(stage_folder))
    return path


def measured_on(stage: Path) -> dict[str, str]:
    """What an amax file of a stage's checkpoint says about itself."""
    return Calibration(open_stage(stage).digest, packs=1, tokens=100, seed=3).metadata()


@pytest.fixture(scope="module")
def bf16(stage_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    out = tmp_path_factory.mktemp("bf16") / "out"
    export(stage_folder, out, ExportOptions("bf16", SHARD_BYTES), quiet)
    return read_all(out)


Releases = dict[tuple[str, str], Path]


@pytest.fixture(scope="module")
def releases(stage_folder: Path, amax: Path, tmp_path_factory: pytest.TempPathFactory) -> Releases:
    base = tmp_path_factory.mktemp("quantized")
    made = {}
    for kind in FORMATS:
        for layout in LAYOUTS:
            made[kind, layout] = base / f"{kind}_{layout}"
            options = ExportOptions(kind, SHARD_BYTES, layout=layout, amax=amax)
            export(stage_folder, made[kind, layout], options, quiet)
    return made


def decoded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights in float32 by their BF16 names, whatever the layout: an independent reader."""
    found = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if tensor.dtype == torch.float8_e4m3fn and name.endswith(".weight"):
            found[name] = tensor.float() * tensors[module + ".weight_scale"].float()
        elif tensor.dtype == torch.uint8:
            nibbles = torch.stack([tensor & 15, tensor >> 4], dim=-1).flatten(1).long()
            if module + ".weight_scale_2" in tensors:
                whole = tensors[module + ".weight_scale_2"]
            else:
                whole = 1 / tensors[module + ".weight_global_scale"]
            blocks = tensors[module + ".weight_scale"].float() * whole
            found[module + ".weight"] = (
                E2M1[nibbles].unflatten(1, (-1, 16)) * blocks.unsqueeze(-1)
            ).flatten(1)
        elif "scale" not in name.rpartition(".")[2]:
            found[name] = tensor
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_every_weight_is_the_nearest_number_of_its_format(
    releases: Releases, bf16: dict[str, Tensor], kind: str, layout: str
) -> None:
    """Against all numbers the format has with the stored scales, in float64.

    FP8 quotients are rounded to bfloat16 first, as the tools it is compared with do.
    """
    tensors = read_all(releases[kind, layout])
    back = decoded(tensors)
    assert back.keys() == bf16.keys()
    quantized = {name for name in back if back[name].dtype != bf16[name].dtype}
    assert len(quantized) == 4 * 2 + 3 * 2 + 4
    for name in back.keys() - quantized:
        assert back[name].equal(bf16[name]), name
    bytes_of_fp8 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    numbers = bytes_of_fp8[bytes_of_fp8.isfinite()] if kind == "fp8" else E2M1.double()
    for name in sorted(quantized):
        module = name.removesuffix(".weight")
        step = torch.ones_like(back[name]).double() * scale_of(tensors, module).double()
        wanted = bf16[name].double() / step
        nearest = (wanted.unsqueeze(-1) - numbers).abs().min(-1).values
        taken = (back[name].double() / step - wanted).abs()
        slack = 1e-4 + (wanted.abs() * 2**-7 if kind == "fp8" else 0)
        assert bool((taken <= nearest + slack).all()), name


def scale_of(tensors: dict[str, Tensor], module: str) -> Tensor:
    """The step of each weight: what its code is multiplied by."""
    scale = tensors[module + ".weight_scale"].float()
    if scale.numel() == 1:
        return scale
    key = module + ".weight_scale_2"
    whole = tensors[key] if key in tensors else 1 / tensors[module + ".weight_global_scale"]
    return (scale * whole).repeat_interleave(16, dim=1)


def test_the_layouts_are_each_others_inverse(releases: Releases) -> None:
    """The same numbers, but for scales that compressed-tensors rounds to BF16."""
    one, other = (read_all(releases["nvfp4", layout]) for layout in LAYOUTS)
    for name, tensor in one.items():
        if tensor.dtype == torch.uint8:
            module = name.removesuffix(".weight")
            same = tensor == other[module + ".weight_packed"]
            assert float(same.float().mean()) > 0.95
            product = one[module + ".weight_scale_2"] * other[module + ".weight_global_scale"]
            assert float(product) == pytest.approx(1, abs=2**-7)


@pytest.mark.parametrize("kind", FORMATS)
def test_scales_are_the_largest_magnitudes(
    releases: Releases, bf16: dict[str, Tensor], amax: Path, kind: str
) -> None:
    tensors, inputs = read_all(releases[kind, "modelopt"]), read_all(amax.parent)
    top = 448.0 if kind == "fp8" else 6 * 448.0
    suffix = ".weight_scale" if kind == "fp8" else ".weight_scale_2"
    for module in quantized_modules(name_table(tiny_stage().model).rules):
        shared = QKV if module in QKV else [module]
        largest = max(float(inputs[m + INPUT_AMAX]) for m in shared)
        assert float(tensors[module + ".input_scale"]) == pytest.approx(largest / top, rel=1e-6)
        weights = shared if kind == "nvfp4" else [module]
        largest = max(float(bf16[m + ".weight"].abs().max()) for m in weights)
        assert float(tensors[module + suffix]) == pytest.approx(largest / top, rel=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FORMATS)
def test_config_files(releases: Releases, kind: str, layout: str) -> None:
    folder = releases[kind, layout]
    said = json.loads((folder / CONFIG_FILE).read_text())["quantization_config"]
    if layout == "compressed_tensors":
        assert said["quant_method"] == "compressed-tensors"
        inputs = said["config_groups"]["group_0"]["input_activations"]
        assert inputs.get("scale_dtype") == (E4M3_NAME if kind == "nvfp4" else None)
        assert not (folder / "hf_quant_config.json").exists()
        return
    other = json.loads((folder / "hf_quant_config.json").read_text())["quantization"]
    assert said["quant_algo"] == other["quant_algo"] == kind.upper()
    assert said["ignore"] == other["exclude_modules"]
    assert {"language_model.lm_head", "mlp1*", "vision_model*"} < set(said["ignore"])
    assert LAYER.format(0) + "conv1d" in said["ignore"]
    assert not any("\x00" in name for name in said["ignore"])


@torch.no_grad()
def test_decoded_weights_answer_like_bf16(
    releases: Releases, bf16: dict[str, Tensor], stage_folder: Path, published: Published
) -> None:
    """Mean divergence of the next token; a wrong scale or nibble order is off by orders."""
    config = json.loads((releases["fp8", "modelopt"] / CONFIG_FILE).read_text())
    decoder = transformers.NemotronHForCausalLM(
        transformers.NemotronHConfig(**config["llm_config"])
    ).eval()
    tokens = torch.randint(32, 500, (2, 60), generator=torch.Generator().manual_seed(3))

    def logits(tensors: dict[str, Tensor]) -> Tensor:
        prefix = "language_model."
        own = {
            name.removeprefix(prefix).replace("backbone.", "model."): tensor.float()
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        decoder.load_state_dict(own)
        return decoder(tokens).logits.log_softmax(-1)

    reference = logits(bf16)
    bound = {"fp8": 0.05, "nvfp4": 0.4}
    for (kind, layout), folder in releases.items():
        found = logits(decoded(read_all(folder)))
        divergence = (reference.exp() * (reference - found)).sum(-1).mean()
        assert 0 < float(divergence) < bound[kind], (kind, layout, float(divergence))


def test_it_explains_itself_and_is_not_trained_on(releases: Releases, tmp_path: Path) -> None:
    for folder in releases.values():
        known = explain(folder, verify=True)
        assert set(known["tensors"]["bytes_by_dtype"]) >= {"BF16", "F8_E4M3"}
    with pytest.raises(ConversionError, match="is quantized"):
        import_folder(releases["fp8", "modelopt"], tmp_path / "out", None, 1, quiet)


def test_a_lost_scale_is_named(releases: Releases, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(releases["nvfp4", "modelopt"], folder)
    (folder / "checksums.json").unlink()
    name = QKV[1] + ".weight_scale_2"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"].pop(name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    held = load_file(path)
    del held[name]
    save_file(held, path)
    with pytest.raises(NamesError, match=f"missing: {name}"):
        explain(folder)


def test_calibration_must_be_complete_and_finite(
    stage_folder: Path, amax: Path, tmp_path: Path
) -> None:
    held = read_all(amax.parent)
    lost = sorted(held)[3]
    for change, message in (
        ({lost: None}, f"missing: {lost}"),
        ({"nobody.input_amax": torch.ones(())}, "over: nobody.input_amax"),
        ({lost: torch.tensor(float("nan"))}, f"{lost} is nan"),
        ({lost: torch.zeros(())}, f"{lost} is 0.0"),
    ):
        changed = {name: value for name, value in {**held, **change}.items() if value is not None}
        path = tmp_path / "amax.safetensors"
        save_file(changed, path, metadata=measured_on(stage_folder))
        with pytest.raises((NamesError, ConversionError), match=message):
            export(stage_folder, tmp_path / "out", ExportOptions("fp8", amax=path), quiet)
    save_file(held, path)
    with pytest.raises(ConversionError, match="does not say which checkpoint"):
        export(stage_folder, tmp_path / "out", ExportOptions("fp8", amax=path), quiet)
    with pytest.raises(ConversionError, match="needs the calibrated inputs"):
        export(stage_folder, tmp_path / "out", ExportOptions("nvfp4"), quiet)


def test_fp4_codes_one_by_one() -> None:
    """Nearest, ties to the even code, sign kept: against a search over all codes."""
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5])
    beside = [torch.nextafter(ties, torch.tensor(end)) for end in (-9.0, 9.0)]
    values = torch.cat([torch.linspace(-7, 7, 2801), ties, *beside])
    found = quantize.e2m1_codes(values)
    for value, code in zip(values.tolist(), found.tolist(), strict=True):
        magnitudes = [abs(abs(value) - number) for number in quantize.E2M1_VALUES]
        nearest = [index for index, gap in enumerate(magnitudes) if gap == min(magnitudes)]
        expected = next((index for index in nearest if index % 2 == 0), nearest[0])
        assert code & 7 == expected, value
        assert bool(code & 8) == (value < 0 or str(value).startswith("-")), value


def test_blocks_of_zeros_and_of_tiny_numbers_survive() -> None:
    weight = torch.randn(4, 64)
    weight[1, 16:32] = 0
    weight[2, :16] *= 1e-6
    scale = quantize.fp4_scale(quantize.amax(weight))
    packed = quantize.to_fp4(weight, scale)
    assert not packed.codes[1, 8:16].bitwise_and(0x77).any()
    assert packed.block_scales.float().min() > 0
    assert quantize.to_fp8(torch.tensor([[1e9, -1e9]]), torch.ones(())).float().tolist() == [
        [448.0, -448.0]
    ]
    with pytest.raises(ValueError, match="infinite or NaN"):
        quantize.amax(torch.tensor([[1.0, float("inf")]]))
