"""`mvl checkpoint export`: a checkpoint of any layout to a folder that Hugging Face programs load.

Streams: names are mapped and tensors transformed rule by rule, on the CPU, without a model; the
checkpoint is compared with its receipt meanwhile, while its pages are in memory.
Padding rows of the vocabulary are no tokens and stay behind unless asked for. `bf16` casts every
floating tensor to bfloat16, as the published weights are; `fp32` widens or keeps to float32; `fp8`
and `nvfp4` quantize the decoder's linears with calibrated inputs (`quantized_layout`).

Refuses: a checkpoint that is not its config's or not what its receipt says, a tokenizer that is not
the model's, image handling that the exported processor does not have, an OUT that exists.
"""

import json
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoint_tools import release_files
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import PROVENANCE_FILE, provenance
from checkpoint_tools.lineage import longest_sequence
from checkpoint_tools.name_rules import Growth, name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_config import published_config
from checkpoint_tools.published_folder import (
    CHECKSUMS_FILE,
    CONFIG_FILE,
    INDEX_FILE,
    index_text,
    shard_name,
)
from checkpoint_tools.quantized_layout import (
    FP8,
    MODELOPT,
    NVFP4,
    QUANTIZED,
    Calibration,
    Quantization,
    applies,
    hf_quant_config,
    outputs,
    quantization_config,
    quantizer,
    read_amax,
)
from checkpoint_tools.safetensors_file import TensorSpec, plan_file
from checkpoint_tools.stage_source import StageSource, open_stage
from checkpoint_tools.streaming import Record, Report, Stream, Task, cast, plan_shards, spec_of
from checkpoint_tools.tensor_bytes import DTYPE_NAMES
from checkpoint_tools.workspace import Workspace, files_identity
from megatron_vl.run.versions import versions

FORMATS = {
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    FP8: torch.bfloat16,
    NVFP4: torch.bfloat16,
}
"""Type of what is not quantized."""
QUANT_CONFIG_FILE = "hf_quant_config.json"
SHARD_BYTES = 4 * 10**9


@dataclass(frozen=True)
class ExportOptions:
    """How a checkpoint is exported.

    Attributes:
        format: a name of `FORMATS`.
        shard_bytes: most bytes of one shard.
        keep_padding: publish the vocabulary's padding rows too.
        check_digest: compare the files with the stage's receipt meanwhile; reads all of them.
        tokenizer: a tokenizer.json; by default the one beside the checkpoint or its data.
        layout: of the quantized formats, a name of `LAYOUTS`.
        amax: calibrated inputs, an amax.safetensors; the quantized formats need it, unless a
            distillation trained the checkpoint under its own.
    """

    format: str = "bf16"
    shard_bytes: int = SHARD_BYTES
    keep_padding: bool = False
    check_digest: bool = True
    tokenizer: Path | None = None
    layout: str = MODELOPT
    amax: Path | None = None


def export(path: Path, out: Path, options: ExportOptions, report: Report) -> None:
    """Write the release folder `out`.

    Args:
        path: a run, a stage folder or a checkpoint.
    """
    source = open_stage(path)
    files = release_files.gather(source, options.tokenizer)
    rows = source.config.model.vocab_size
    if options.keep_padding:
        rows = source.config.model.padded_vocab_size
    table = name_table(
        source.config.model, Growth(rows, source.config.model.encoder.num_prefix_tokens)
    )
    chosen = _quantization(options, table, source)
    tasks = export_tasks(source, table, FORMATS[options.format], chosen)
    shards = plan_shards(tasks, options.shard_bytes, shard_name)
    plan = {
        "what": "export",
        "shards": [[s.file, {n: _plain(t) for n, t in s.specs.items()}] for s in shards],
        "source": files_identity(source.checkpoint.folder),
        "inputs": {n: v.item() for n, v in chosen.inputs.items()} if chosen else None,
    }
    with Workspace(out, plan) as workspace:
        constants = {c.name: c.value for c in table.constants}
        stream = Stream(
            lambda name: constants[name] if name in constants else source.checkpoint.read(name),
            workspace,
            workspace.path,
            plan_file,
            report,
        )
        with ThreadPoolExecutor(1) as beside:
            described = beside.submit(
                config_files, source, table, rows, options.format, chosen, files
            )
            checked = beside.submit(source.check_digest) if options.check_digest else None
            records = stream.run(shards)
            _accept(checked, workspace)
        said = described.result()
        for name, value in said.items():
            (workspace.path / name).write_text(json.dumps(value, indent=2) + "\n")
        _write_rest(workspace.path, source, files, said[CONFIG_FILE], records, chosen)
        workspace.publish()


def _accept(checked: Future[None] | None, workspace: Workspace) -> None:
    """Wait for the comparison of a checkpoint with its receipt.

    Raises ConversionError where it differs; what was made of it is dropped.
    """
    try:
        if checked is not None:
            checked.result()
    except ConversionError:
        workspace.clear()
        raise


def _quantization(
    options: ExportOptions, table: NameTable, source: StageSource
) -> Quantization | None:
    if options.format not in QUANTIZED:
        return None
    amax = options.amax or source.trained_amax
    if amax is None:
        raise ConversionError(
            f"--format {options.format} needs the calibrated inputs: --amax amax.safetensors, "
            "which `mvl checkpoint calibrate` makes"
        )
    inputs, made = read_amax(amax, table.rules), Calibration.read(amax)
    if made.digest != source.digest:
        raise ConversionError(
            f"{amax} was measured on another checkpoint (digest {made.digest[:12]}, this "
            f"one has {source.digest[:12]}); run `mvl checkpoint calibrate` on this one"
        )
    return Quantization(options.format, options.layout, inputs, made)


def export_tasks(
    source: StageSource, table: NameTable, dtype: torch.dtype, chosen: Quantization | None = None
) -> list[Task]:
    """The work of an export: the constants, then every rule of the table."""
    constants = [
        Task((c.name,), {c.name: TensorSpec(c.value.dtype, tuple(c.value.shape))}, list)
        for c in table.constants
        if c.written
    ]
    tasks = []
    for rule in table.rules:
        inputs = tuple(slot.name for slot in rule.stored)
        stored = [source.checkpoint.tensors[name] for name in inputs]
        held = sum(spec.num_bytes for spec in stored)
        if chosen is not None and applies(rule):
            tasks.append(Task(inputs, outputs(rule, chosen), quantizer(rule, chosen), held))
            continue
        specs = {
            slot.name: cast(dtype, TensorSpec(stored[0].dtype, slot.shape))
            for slot in rule.published
        }
        tasks.append(Task(inputs, specs, rule.to_published, held))
    return constants + tasks


def config_files(
    source: StageSource,
    table: NameTable,
    rows: int,
    format_name: str,
    chosen: Quantization | None,
    files: release_files.ReleaseFiles,
) -> dict[str, dict[str, Any]]:
    """config.json and, where the layout has one, hf_quant_config.json, by name.

    Args:
        rows: of the vocabulary, as published.
    """
    dtype = str(FORMATS[format_name]).removeprefix("torch.")
    longest = longest_sequence(source.ancestors)
    config = published_config(source.config, rows, dtype, files.ids, longest)
    if chosen is None:
        return {CONFIG_FILE: config}
    config["quantization_config"] = quantization_config(chosen, table.rules)
    said = {CONFIG_FILE: config}
    if chosen.layout == MODELOPT:
        said[QUANT_CONFIG_FILE] = hf_quant_config(chosen, table.rules)
    return said


def _plain(spec: TensorSpec) -> list[Any]:
    return [DTYPE_NAMES[spec.dtype], list(spec.shape)]


def _write_rest(
    folder: Path,
    source: StageSource,
    files: release_files.ReleaseFiles,
    config: dict[str, Any],
    records: dict[str, Record],
    chosen: Quantization | None,
) -> None:
    """Everything that is not a shard; the checksums last, as they cover the rest."""
    specs = {n: spec_of(entry) for record in records.values() for n, entry in record.items()}
    (folder / INDEX_FILE).write_text(index_text(records, specs))
    files.write(folder, source, config, sum(spec.num_bytes for spec in specs.values()))
    made = {"made_by": "mvl checkpoint export", **provenance(source), "exported_with": versions()}
    if chosen is not None:
        made["calibration"] = chosen.provenance()
    (folder / PROVENANCE_FILE).write_text(json.dumps(made, indent=1) + "\n")
    tensors = {
        name: {"file": file, **entry}
        for file, record in records.items()
        for name, entry in record.items()
    }
    checksums = {
        "schema": 1,
        "algorithm": "sha256",
        "files": release_files.file_hashes(folder, skip=set(records)),
        "tensors": tensors,
    }
    (folder / CHECKSUMS_FILE).write_text(json.dumps(checksums, indent=1) + "\n")
