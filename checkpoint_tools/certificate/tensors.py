"""Checks of a release's tensors: names, types, shapes, hashes, and every number against the
checkpoint.

One streaming pass makes each tensor again from the checkpoint, compares its bytes, hashes what lies
in the file, and, for quantized ones, holds scales and codes to the identities of the format with a
reader of its own (`decode`). The peak is a few of the largest tensors.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from checkpoint_tools import quantize
from checkpoint_tools.certificate.check import Findings
from checkpoint_tools.certificate.subject import Subject
from checkpoint_tools.decode import decoded_weight, input_scale
from checkpoint_tools.names import NamesError, Rule, Slot, compare
from checkpoint_tools.quantized_layout import (
    COMPRESSED,
    FP8,
    MODELOPT,
    NVFP4,
    Quantization,
    applies,
    outputs,
)
from checkpoint_tools.tensor_bytes import DTYPE_NAMES, sha256

_BITS = {FP8: 8.0, NVFP4: 4.5}
"""Of a weight of a quantized matrix, its block scales included, its two or three numbers not."""
_SLACK = {MODELOPT: 1e-6, COMPRESSED: 2.0**-7}
"""How far a scale may be from amax over its range: compressed-tensors rounds to bfloat16."""


def check_names(subject: Subject, findings: Findings) -> bool:
    """Exactly the model's tensors, with their types and shapes."""
    specs, found = subject.specs(), subject.published.tensors
    expected = {name: Slot(name, spec.shape) for name, spec in specs.items()}
    try:
        where = subject.folder.name
        compare(expected, {n: s.shape for n, s in found.items()}, where, "published")
    except NamesError as error:
        return findings.add("names", False, f"{len(found)} tensors", len(specs), str(error))
    findings.add("names", True, f"{len(found)} tensors, none missing or over", len(specs))
    wrong = [
        f"{name} is {DTYPE_NAMES[found[name].dtype]}, expected {DTYPE_NAMES[spec.dtype]}"
        for name, spec in specs.items()
        if found[name].dtype != spec.dtype
    ]
    return findings.none_of("dtypes_and_shapes", wrong, len(specs), "tensors")


def check_bits(subject: Subject, findings: Findings) -> bool:
    """Bits for each weight of the quantized matrices, and of the whole release."""
    tensors = subject.published.tensors
    weights = sum(_numbers(slot.shape) for r in subject.table.rules for slot in r.published)
    total = sum(spec.num_bytes for spec in tensors.values())
    findings.figures["bits_per_parameter"] = round(8 * total / weights, 3)
    if subject.chosen is None:
        bits, measured = 8 * subject.dtype.itemsize, round(8 * total / weights, 3)
        # A few constants are neither weights nor of that type.
        return findings.add("bits_per_parameter", abs(measured - bits) < 0.1, measured, bits)
    rules = [rule for rule in subject.table.rules if applies(rule)]
    held = [n for r in rules for n, s in outputs(r, subject.chosen).items() if len(s.shape) > 1]
    stored = 8 * sum(tensors[name].num_bytes for name in held)
    measured = stored / sum(_numbers(slot.shape) for r in rules for slot in r.published)
    bound = _BITS[subject.chosen.format]
    return findings.add("bits_per_parameter", measured == bound, measured, bound)


def _numbers(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def check_numbers(subject: Subject, findings: Findings, report: Callable[[str], None]) -> bool:
    """The streaming pass: recorded hashes, bytes against the checkpoint, scales."""
    unlike_hash: list[str] = []
    unlike_checkpoint: list[str] = []
    odd_scales: list[str] = []
    constants = {constant.name: constant.value for constant in subject.table.constants}
    by_input = {rule.stored[0].name: rule for rule in subject.table.rules}
    tasks, done, started = subject.tasks(), 0, time.perf_counter()
    last = started
    for task in tasks:
        own = constants.get(task.inputs[0])
        stored = [
            own if own is not None else subject.source.checkpoint.read(name) for name in task.inputs
        ]
        made = dict(zip(task.outputs, task.run(stored), strict=True))
        held = {name: subject.published.read(name) for name in task.outputs}
        for name, spec in task.outputs.items():
            found = held[name]
            if sha256(found) != subject.published.sha256.get(name):
                unlike_hash.append(f"{name} in {subject.published.file_of(name)}")
            if not _equal(found, made[name].to(spec.dtype).contiguous()):
                unlike_checkpoint.append(name)
            done += spec.num_bytes
        rule = by_input.get(task.inputs[0])
        if subject.chosen is not None and rule is not None and applies(rule):
            odd_scales += scale_faults(rule, held, rule.to_published(stored), subject.chosen)
        if time.perf_counter() - last > 5:
            last = time.perf_counter()
            report(f"tensors: {done / 1e9:.2f} GB, {done / 1e9 / (last - started):.2f} GB/s")
    findings.figures["read_gb_per_s"] = round(done / 1e9 / (time.perf_counter() - started), 3)
    findings.figures["gigabytes"] = round(done / 1e9, 4)
    count = len(subject.published.tensors)
    passed = findings.none_of("tensor_hashes", unlike_hash, count, "tensors")
    passed &= findings.none_of("tensors_of_checkpoint", unlike_checkpoint, count, "tensors")
    if subject.chosen is not None:
        matrices = sum(len(r.published) for r in subject.table.rules if applies(r))
        passed &= findings.none_of("scales", odd_scales, matrices, "matrices")
    return passed


def _equal(one: Tensor, other: Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    flat = (t.reshape(-1).view(torch.uint8) for t in (one, other))
    return torch.equal(*flat)


def scale_faults(
    rule: Rule, held: Mapping[str, Tensor], weights: list[Tensor], chosen: Quantization
) -> list[str]:
    """What is wrong with the scales and codes of a rule's matrices, a sentence each.

    - the input scale times its range is the calibrated amax, the tensor scale that of the weight;
    - NVFP4: the largest block scale times the tensor scale gives the block's amax back;
    - every decoded number is within half a step of the number format from the weight.

    Args:
        weights: the checkpoint's, published form.
    """
    modules = [slot.name.removesuffix(".weight") for slot in rule.published]
    top = quantize.E4M3_LARGEST * (1.0 if chosen.format == FP8 else quantize.E2M1_LARGEST)
    slack = _SLACK[chosen.layout]
    inputs = max(float(chosen.inputs[module]) for module in modules)
    rounded = [weight.to(torch.bfloat16).float() for weight in weights]
    together = max(float(weight.abs().max()) for weight in rounded)
    faults = []
    for module, weight in zip(modules, rounded, strict=True):
        amax = float(weight.abs().max()) if chosen.format == FP8 else together
        scales = {"input": (float(input_scale(held, module, chosen)), inputs)}
        scales["weight"] = (_tensor_scale(held, module, chosen), amax)
        for what, (scale, largest) in scales.items():
            if chosen.format != FP8 and chosen.layout == COMPRESSED:
                scale = 1 / scale
            if not abs(scale * top / largest - 1) <= slack:
                faults.append(
                    f"{module}: the {what} scale {scale:.6g} times {top:g} is not the amax "
                    f"{largest:.6g}"
                )
        gap = (decoded_weight(held, module, chosen) - weight).abs()
        if not bool((gap <= _half_step(held, module, weight, chosen)).all()):
            faults.append(f"{module}: a decoded weight is off by {float(gap.max()):.3g}")
    return faults


def _tensor_scale(held: Mapping[str, Tensor], module: str, chosen: Quantization) -> float:
    name = ".weight_scale"
    if chosen.format != FP8:
        name = ".weight_scale_2" if chosen.layout == MODELOPT else ".weight_global_scale"
    return float(held[module + name])


def _half_step(
    held: Mapping[str, Tensor], module: str, weight_RK: Tensor, chosen: Quantization
) -> Tensor:
    """How far a decoded weight may be from the weight, each.

    FP8: half a step of E4M3, 2^-4 of the number, of the quotient in bfloat16 once more 2^-8, and
    2^-10 of the scale below the normal numbers. NVFP4: half the gap from 4 to 6, in block steps.
    """
    scale = held[module + ".weight_scale"].float()
    if chosen.format == FP8:
        return weight_RK.abs() * (2.0**-4 + 2.0**-7) + scale * 2.0**-9
    tensor_scale = _tensor_scale(held, module, chosen)
    whole = tensor_scale if chosen.layout == MODELOPT else 1 / tensor_scale
    steps_RB = scale * whole
    return (steps_RB * 1.01).repeat_interleave(quantize.GROUP, dim=1)
