"""What a certificate is about: a release as it lies on disk, beside the checkpoint it claims to be.

The expected side is derived anew from the checkpoint: names, types and shapes of all tensors and
the arithmetic that makes them. A quantized release says in its `provenance.json` with which inputs
it was calibrated.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.decode import decoded_weight, read_decoded
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import PROVENANCE_FILE
from checkpoint_tools.export_hf import FORMATS, export_tasks
from checkpoint_tools.name_rules import Growth, name_table
from checkpoint_tools.names import NameTable, Rule
from checkpoint_tools.published_folder import PublishedFolder, read_json
from checkpoint_tools.quantized_layout import (
    INPUT_AMAX,
    Quantization,
    applies,
    described,
    outputs,
    quantized_modules,
    quantizer,
)
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.stage_source import StageSource
from checkpoint_tools.streaming import Task

_WIDE = {"bfloat16": "bf16", "float32": "fp32"}


@dataclass(frozen=True)
class Subject:
    """A release beside its checkpoint.

    Attributes:
        published: the folder; its index and headers are sound.
        format: bf16, fp32, fp8 or nvfp4.
        chosen: how it is quantized; None for the first two.
        rows: of the vocabulary, as published.
    """

    published: PublishedFolder
    source: StageSource
    format: str
    chosen: Quantization | None
    table: NameTable
    rows: int

    @property
    def folder(self) -> Path:
        """Where the release lies."""
        return self.published.folder

    @property
    def dtype(self) -> torch.dtype:
        """Type of what is not quantized."""
        return FORMATS[self.format]

    def tasks(self) -> list[Task]:
        """How every tensor comes from the checkpoint."""
        return export_tasks(self.source, self.table, self.dtype, self.chosen)

    def specs(self) -> dict[str, TensorSpec]:
        """Type and shape of every tensor."""
        return {name: spec for task in self.tasks() for name, spec in task.outputs.items()}

    def as_released(self, rule: Rule, stored: Sequence[Tensor]) -> list[Tensor]:
        """A rule's stored tensors as a release gives them back: rounded, or quantized and decoded.

        Made from the checkpoint, not from the release: `reference.Weights`.
        """
        if self.chosen is None or not applies(rule):
            return [tensor.to(self.dtype) for tensor in stored]
        made = quantizer(rule, self.chosen)(stored)
        held = dict(zip(outputs(rule, self.chosen), made, strict=True))
        modules = [slot.name.removesuffix(".weight") for slot in rule.published]
        return rule.to_stored([decoded_weight(held, module, self.chosen) for module in modules])

    def rounded(self, rule: Rule, stored: Sequence[Tensor]) -> list[Tensor]:
        """A rule's stored tensors as the BF16 release gives them back."""
        return [tensor.to(self.dtype) for tensor in stored]

    def persisted(self, rule: Rule, _: Sequence[Tensor]) -> list[Tensor]:
        """A rule's stored tensors as the files of the release give them back."""
        return rule.to_stored([self._decoded(slot.name, rule) for slot in rule.published])

    def _decoded(self, name: str, rule: Rule) -> Tensor:
        return read_decoded(self.published.read, name, rule, self.chosen)

    def decoded(self) -> Iterator[tuple[str, Tensor]]:
        """The release's own tensors, quantized ones as the numbers they stand for, under the names
        of the BF16 release."""
        for constant in self.table.constants:
            if constant.name in self.published.tensors:
                yield constant.name, self.published.read(constant.name)
        for rule in self.table.rules:
            for slot in rule.published:
                yield slot.name, self._decoded(slot.name, rule)


def open_subject(published: PublishedFolder, source: StageSource) -> Subject:
    """Put a release beside a checkpoint.

    Raises:
        ConversionError, KeyError: config.json or provenance.json do not say what kind it is.
    """
    config = published.config
    chosen = described(config)
    if chosen is None:
        name = config.get("torch_dtype")
        if name not in _WIDE:
            raise ConversionError(f"config.json says torch_dtype {name!r}; known are {set(_WIDE)}")
        format_name = _WIDE[name]
    else:
        format_name = chosen.format
    model = source.config.model
    rows = (config.get("llm_config") or {}).get("vocab_size")
    if rows not in (model.vocab_size, model.padded_vocab_size):
        raise ConversionError(
            f"config.json says llm_config.vocab_size {rows}, the checkpoint publishes "
            f"{model.vocab_size} (or {model.padded_vocab_size} with its padding)"
        )
    table = name_table(model, Growth(rows, model.encoder.num_prefix_tokens))
    if chosen is not None:
        inputs = _calibrated(published.folder, table)
        chosen = Quantization(chosen.format, chosen.layout, inputs)
    return Subject(published, source, format_name, chosen, table, rows)


def _calibrated(folder: Path, table: NameTable) -> dict[str, Tensor]:
    said = read_json(folder / PROVENANCE_FILE).get("calibration", {}).get("input_amax", {})
    modules = quantized_modules(table.rules)
    missing = [module for module in modules if module not in said]
    if missing:
        raise ConversionError(
            f"{folder / PROVENANCE_FILE} does not say what {missing[0] + INPUT_AMAX} was measured "
            "as; export the checkpoint again"
        )
    return {module: torch.tensor(said[module], dtype=torch.float32) for module in modules}
