"""`mvl checkpoint calibrate`: the largest inputs of the linears that a release quantizes.

One pass of the real model over packs of the stage's own training data gives `amax.safetensors`:
`MODULE.input_amax`, a float32 number for each quantized module under its published name, and in the
file's metadata the digest of the checkpoint, the packs, tokens and seed. Export refuses an amax of
another checkpoint.

Deterministic: the same checkpoint and data give the same file on the same kind of machine.
Refuses: a stage without data, a linear whose input is not finite.
Costs: the model in memory, in the stage's precision, and a forward pass over the packs.
"""

import os
from collections.abc import Callable
from pathlib import Path

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.quantized_layout import INPUT_AMAX, Calibration
from checkpoint_tools.reference import quantized_linears, reference_model
from checkpoint_tools.safetensors_file import SafetensorsWriter, TensorSpec
from checkpoint_tools.stage_source import StageSource, open_stage
from megatron_vl.train.calibrate import CalibrationProgress, largest_inputs, planned_packs

PACKS = 32
"""Packs that calibration looks at by default."""


def calibrate(
    path: Path, out: Path, report: Callable[[CalibrationProgress], None], packs: int = PACKS
) -> Calibration:
    """Write the amax file `out` of the checkpoint that `path` stands for.

    Args:
        packs: how many to look at, at most; fewer where the data ends.

    Returns:
        What the file says about itself.

    Raises:
        ConversionError: OUT exists, or the checkpoint cannot be opened.
        FileNotFoundError, ValueError: the stage's data is not there or gives no pack.
    """
    if out.exists():
        raise ConversionError(f"{out} exists already; name another file or remove it first")
    if packs < 1:
        raise ConversionError(f"calibration over {packs} packs; the least is 1")
    source = open_stage(path)
    return calibrate_stage(source, out, report, packs)


def calibrate_stage(
    source: StageSource, out: Path, report: Callable[[CalibrationProgress], None], packs: int
) -> Calibration:
    """`calibrate` of an opened checkpoint; replaces OUT."""
    linears = quantized_linears(source.table)
    shown = planned_packs(source.config, "train", packs)
    with reference_model(source) as module:
        largest, seen = largest_inputs(module, linears, shown, packs, report)
    held = {
        slot.name.removesuffix(".weight") + INPUT_AMAX: largest[name]
        for name, rule in linears.items()
        for slot in rule.published
    }
    made = Calibration(source.digest, seen.packs, seen.tokens, source.config.train.seed)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(out.name + ".partial")
    specs = {name: TensorSpec(value.dtype, ()) for name, value in held.items()}
    writer = SafetensorsWriter(partial, specs, made.metadata())
    for name, value in held.items():
        writer.write(name, value)
    writer.finish()
    os.replace(partial, out)
    return made
