"""The folders that vLLM is asked to serve: one checkpoint exported in every format and layout.

The BF16 one is certified as a release is. Quantized ones are calibrated on the questions that are
asked later, as the model is drawn and has no data of its own; for the same reason they have no
certificate, whose bounds on KL are for held-out answers.
"""

from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import save_file

from bench.vllm.questions import Case
from checkpoint_tools.certificate.run import certify, failures
from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.open_export import open_export
from checkpoint_tools.quantized_layout import INPUT_AMAX, Calibration
from checkpoint_tools.reference import quantized_linears
from checkpoint_tools.stage_source import open_stage
from megatron_vl.data.pack import Pack
from megatron_vl.infer.decode import prompt_of
from megatron_vl.infer.model import OpenModel
from megatron_vl.train.calibrate import largest_inputs

QUANTIZED = {
    "fp8 modelopt": ("fp8", "modelopt"),
    "fp8 compressed-tensors": ("fp8", "compressed_tensors"),
    "nvfp4 modelopt": ("nvfp4", "modelopt"),
    "nvfp4 compressed-tensors": ("nvfp4", "compressed_tensors"),
}
BF16 = "bf16"


def export_bf16(stage: Path, out: Path) -> Path:
    """The folder in bfloat16."""
    export(stage, out, ExportOptions(BF16), lambda progress: None)
    return out


def export_quantized(stage: Path, base: Path, bf16: Path, cases: Iterable[Case]) -> dict[str, Path]:
    """The folders of QUANTIZED, their inputs calibrated on the cases."""
    amax = base / "amax.safetensors"
    with open_export(bf16) as model:
        _calibrate(stage, model, [prompt_of(model, c.question, c.reasoning) for c in cases], amax)
    made = {}
    for name, (kind, layout) in QUANTIZED.items():
        made[name] = base / name.replace(" ", "-")
        options = ExportOptions(kind, layout=layout, amax=amax)
        export(stage, made[name], options, lambda progress: None)
    return made


def _calibrate(stage: Path, model: OpenModel, packs: list[Pack], out: Path) -> None:
    """Write the amax file of the packs."""
    source = open_stage(stage)
    linears = quantized_linears(source.table)
    largest, seen = largest_inputs(model.module, linears, packs, len(packs), lambda done: None)
    held = {
        slot.name.removesuffix(".weight") + INPUT_AMAX: largest[name].clone()
        for name, rule in linears.items()
        for slot in rule.published
    }
    about = Calibration(source.digest, seen.packs, seen.tokens, source.config.train.seed)
    save_file(held, out, metadata=about.metadata())


def certified(folder: Path, stage: Path) -> list[str]:
    """What the release's certificate says, a line; raises where it fails.

    Raises:
        RuntimeError: with each failed check.
    """
    made = certify(folder, stage, lambda line: None)
    if not made["passed"]:
        raise RuntimeError("the export's certificate fails:\n" + "\n".join(failures(made)))
    return [check["name"] for check in made["checks"]]
