"""Which tensors a quantized release holds and what its config files say, in two layouts.

    modelopt            NVIDIA Model Optimizer's unified layout: what NVIDIA publishes, vLLM reads
    compressed_tensors  llm-compressor's: vLLM reads it, transformers reloads it

Quantized are the decoder's linears, weights and activations; encoder, projector, embeddings, output
matrix and convolutions stay bfloat16. Query, key and value share the scales a fused kernel needs
shared: the input scale, and in NVFP4 the tensor scale of the weight.

The calibrated side is an `amax.safetensors`: `MODULE.input_amax`, one float32 number for each
quantized module under its published name, complete in both directions, and in the file's metadata
which checkpoint it was measured on.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools import quantize
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.names import Rule, Slot, compare
from checkpoint_tools.safetensors_file import TensorSpec, read_entry, read_header, read_metadata

MODELOPT, COMPRESSED = "modelopt", "compressed_tensors"
LAYOUTS = (MODELOPT, COMPRESSED)
FP8, NVFP4 = "fp8", "nvfp4"
QUANTIZED = (FP8, NVFP4)
INPUT_AMAX = ".input_amax"
_LINEAR = re.compile(
    r"language_model\.backbone\.layers\.\d+\.mixer\."
    r"(?:in_proj|out_proj|up_proj|down_proj|[qkvo]_proj)\.weight$"
)
_CONVOLUTION = re.compile(r"(.*\.conv1d)\.weight$")
_PRODUCER = {"name": "modelopt", "version": "0.47.0"}
"""Readers know the layout by this name."""
_F32, _BF16, _U8 = torch.float32, torch.bfloat16, torch.uint8
_ALGORITHM = {FP8: "FP8", NVFP4: "NVFP4"}

Outputs = dict[str, TensorSpec]


@dataclass(frozen=True)
class Calibration:
    """What an amax file says about itself.

    Attributes:
        digest: of the checkpoint it was measured on.
        packs, tokens: of the stage's data, that were looked at.
        seed: of the plan they come from.
    """

    digest: str
    packs: int
    tokens: int
    seed: int

    def metadata(self) -> dict[str, str]:
        """As a safetensors file holds it."""
        return {name: str(value) for name, value in vars(self).items()}

    @classmethod
    def read(cls, path: Path) -> "Calibration":
        """That of a file. Raises ConversionError where it does not say."""
        said = read_metadata(path)
        try:
            numbers = (int(said[name]) for name in ("packs", "tokens", "seed"))
            return cls(said["digest"], *numbers)
        except (KeyError, ValueError) as error:
            raise ConversionError(
                f"{path} does not say which checkpoint it was measured on ({error!r}); make it "
                "with `mvl checkpoint calibrate`"
            ) from error


@dataclass(frozen=True)
class Quantization:
    """A number format, a layout, and the largest inputs of every quantized module.

    Attributes:
        format: fp8 or nvfp4.
        layout: modelopt or compressed_tensors.
        inputs: float32 number by module.
        calibration: where they come from.
    """

    format: str
    layout: str
    inputs: Mapping[str, Tensor]
    calibration: Calibration | None = None

    def provenance(self) -> dict[str, Any]:
        """Where the inputs come from and what they are, for `provenance.json`."""
        said = vars(self.calibration) if self.calibration is not None else {}
        return {**said, "input_amax": {name: float(v) for name, v in self.inputs.items()}}


def quantized_modules(rules: Sequence[Rule]) -> list[str]:
    """Published names of the modules that are quantized."""
    return [_module(slot) for rule in rules if applies(rule) for slot in rule.published]


def applies(rule: Rule) -> bool:
    """Whether a rule's published tensors are quantized."""
    return all(_LINEAR.match(slot.name) for slot in rule.published)


def read_amax(path: Path, rules: Sequence[Rule]) -> dict[str, Tensor]:
    """The calibrated largest inputs.

    Raises:
        NamesError: they are not those of exactly the quantized modules.
        ConversionError: one is no positive, finite number, or the file is damaged.
    """
    header = read_header(path)
    expected = {name + INPUT_AMAX: Slot(name, ()) for name in quantized_modules(rules)}
    compare(expected, {name: e.spec.shape for name, e in header.items()}, str(path), "calibrated")
    found = {name: read_entry(path, entry).float() for name, entry in header.items()}
    for name, value in found.items():
        if not (bool(value.isfinite()) and float(value) > 0):
            raise ConversionError(f"{path}: {name} is {float(value)}; calibrate again")
    return {name.removesuffix(INPUT_AMAX): value for name, value in found.items()}


def outputs(rule: Rule, chosen: Quantization) -> Outputs:
    """What a quantized rule writes, by name.

    Raises:
        ConversionError: NVFP4 and a width that is no multiple of 16.
    """
    specs: Outputs = {}
    for slot in rule.published:
        module, (rows, columns) = _module(slot), slot.shape
        if chosen.format == FP8:
            scale = TensorSpec(_F32, ()) if chosen.layout == MODELOPT else TensorSpec(_BF16, (1,))
            specs |= {
                module + ".weight": TensorSpec(quantize.E4M3, slot.shape),
                module + ".weight_scale": scale,
                module + ".input_scale": scale,
            }
            continue
        if columns % quantize.GROUP:
            raise ConversionError(
                f"{slot.name} has {columns} columns; NVFP4 needs a multiple of {quantize.GROUP}"
            )
        codes = TensorSpec(_U8, (rows, columns // 2))
        blocks = TensorSpec(quantize.E4M3, (rows, columns // quantize.GROUP))
        if chosen.layout == MODELOPT:
            specs |= {
                module + ".weight": codes,
                module + ".weight_scale": blocks,
                module + ".weight_scale_2": TensorSpec(_F32, ()),
                module + ".input_scale": TensorSpec(_F32, ()),
            }
        else:
            specs |= {
                module + ".weight_packed": codes,
                module + ".weight_scale": blocks,
                module + ".weight_global_scale": TensorSpec(_F32, (1,)),
                module + ".input_global_scale": TensorSpec(_F32, (1,)),
            }
    return specs


def quantizer(rule: Rule, chosen: Quantization) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """From a rule's stored tensors to `outputs`, in their order."""
    modules = [_module(slot) for slot in rule.published]
    # Modules of one rule read one input.
    largest_input = torch.stack([chosen.inputs[module] for module in modules]).max()

    def fp8(weights: Sequence[Tensor]) -> list[Tensor]:
        made: list[Tensor] = []
        for weight in weights:
            scales = [quantize.fp8_scale(v) for v in (quantize.amax(weight), largest_input)]
            if chosen.layout == COMPRESSED:
                scales = [scale.to(_BF16).reshape(1) for scale in scales]
            made += [quantize.to_fp8(weight, scales[0]), *scales]
        return made

    def nvfp4(weights: Sequence[Tensor]) -> list[Tensor]:
        largest = torch.stack([quantize.amax(weight) for weight in weights]).max()
        inverse = chosen.layout == COMPRESSED
        if inverse:
            top = quantize.E2M1_LARGEST * quantize.E4M3_LARGEST
            # llm-compressor's statistics are bfloat16, and so is this quotient.
            scales = [(top / v.to(_BF16)).float().reshape(1) for v in (largest, largest_input)]
        else:
            scales = [quantize.fp4_scale(value) for value in (largest, largest_input)]
        made: list[Tensor] = []
        for weight in weights:
            packed = quantize.to_fp4(weight, scales[0], inverse=inverse)
            made += [packed.codes, packed.block_scales, *scales]
        return made

    make = fp8 if chosen.format == FP8 else nvfp4
    # From the weights as the BF16 release holds them.
    return lambda stored: make([weight.to(_BF16) for weight in rule.to_published(stored)])


def described(config: Mapping[str, Any]) -> Quantization | None:
    """Format and layout that a config.json names; None where it names none.

    Raises:
        ConversionError: another format or layout.
    """
    found = config.get("quantization_config")
    if found is None:
        return None
    for layout in LAYOUTS:
        for format_name in QUANTIZED:
            chosen = Quantization(format_name, layout, {})
            same = ("quant_method", "quant_algo", "format")
            if all(found.get(k) == quantization_config(chosen, []).get(k) for k in same):
                return chosen
    raise ConversionError(f"quantization_config is of another kind: {found.get('quant_method')!r}")


def _module(slot: Slot) -> str:
    return slot.name.removesuffix(".weight")


def kept_modules(rules: Sequence[Rule]) -> list[str]:
    """What a quantized release leaves as it is, as its config files list it."""
    slots = (slot.name for rule in rules for slot in rule.published)
    convolutions = [match[1] for match in map(_CONVOLUTION.match, slots) if match]
    return ["language_model.lm_head", *convolutions, "vision_model*", "mlp1*"]


def quantization_config(chosen: Quantization, rules: Sequence[Rule]) -> dict[str, Any]:
    """`quantization_config` of config.json."""
    if chosen.layout == MODELOPT:
        return {
            "quant_method": "modelopt",
            "quant_algo": _ALGORITHM[chosen.format],
            "config_groups": {"group_0": _group(chosen)},
            "ignore": kept_modules(rules),
            "producer": _PRODUCER,
        }
    packed = chosen.format == NVFP4
    return {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized" if packed else "float-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": {"group_0": _group(chosen)},
        "ignore": ["re:.*lm_head", "re:.*conv1d", "re:vision_model.*", "re:mlp1.*"],
    }


def hf_quant_config(chosen: Quantization, rules: Sequence[Rule]) -> dict[str, Any]:
    """hf_quant_config.json of the modelopt layout: the same list of kept modules."""
    group = {"group_size": quantize.GROUP} if chosen.format == NVFP4 else {}
    return {
        "producer": _PRODUCER,
        "quantization": {
            "quant_algo": _ALGORITHM[chosen.format],
            "kv_cache_quant_algo": None,
            **group,
            "exclude_modules": kept_modules(rules),
        },
    }


def _group(chosen: Quantization) -> dict[str, Any]:
    bits = 8 if chosen.format == FP8 else 4
    half: dict[str, Any] = {"num_bits": bits, "type": "float", "dynamic": False}
    if chosen.layout == MODELOPT:
        if chosen.format == NVFP4:
            half |= {"group_size": quantize.GROUP}
        return {"weights": half, "input_activations": half, "targets": ["Linear"]}
    half |= {"symmetric": True, "strategy": "tensor"}
    inputs = dict(half)
    if chosen.format == NVFP4:
        # Without these types a reader keeps the blocks' scales of the inputs unrounded.
        rounded = dict.fromkeys(("scale_dtype", "zp_dtype"), "torch.float8_e4m3fn")
        half |= {"strategy": "tensor_group", "group_size": quantize.GROUP, **rounded}
        inputs = {**half, "dynamic": "local"}
    return {
        "weights": half,
        "input_activations": inputs,
        "output_activations": None,
        "targets": ["Linear"],
    }
