"""`mvl checkpoint import`: a published folder to a stage folder that trains on at any layout.

Streams, as export does. Where the folder records hashes every tensor is compared with its own.
Tensors keep their type. With a stage file (`like`) the result is that stage, whose model must be
the folder's; its vocabulary may be larger and is then grown (`transforms.grow_vocabulary`).

Refuses: folders that are damaged or hold pickles, another architecture, tensors that are not the
config's, constants this model does not have, an OUT that exists.
"""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.name_rules import Growth, name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import (
    CONFIG_FILE,
    PUBLISHED_TOKENIZER,
    PublishedFolder,
)
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.stage_folder import Origin, Streamed, write_stage_folder
from checkpoint_tools.streaming import Report, Task
from checkpoint_tools.workspace import files_identity
from megatron_vl.config.check import check_stage
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import OptimizerConfig, Part, Precision, StageConfig, TrainConfig
from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.data.tokenizer import Tokenizer

_FREE = ("init_std", "mamba_chunk_size")
"""Keys of the model section that change no result of the weights."""
_NO_DATA = "none_yet"
"""The source a stage without a stage file names: a stage must name one."""


def import_folder(folder: Path, out: Path, like: Path | None, seed: int, report: Report) -> None:
    """Write the stage folder `out` from a published one.

    Args:
        like: a stage file; without it the stage is called import and has only its sizes.
        seed: of the rows a larger vocabulary gets.
    """
    source = PublishedFolder(folder)
    if "quantization_config" in source.config:
        raise ConversionError(
            f"{folder} is quantized; training starts from the BF16 release it was made of"
        )
    published = model_of(source.config)
    tokenizer = folder / PUBLISHED_TOKENIZER
    if tokenizer.is_file():
        entries = Tokenizer.load(tokenizer).vocab_size
        published = replace(published, vocab_size=min(entries, published.padded_vocab_size))
    config = _stage(source, published, out) if like is None else load_stage(like)
    _check_model(config.model, published, folder / CONFIG_FILE, like)
    rows = published.padded_vocab_size
    table = name_table(config.model, Growth(rows, published.encoder.num_prefix_tokens, seed))
    table.check_published(source.shapes(), str(folder))
    source.check_constants(table.constants)
    drawn = []
    if rows < config.model.padded_vocab_size:
        drawn.append(grown_sentence(config.model, rows, seed))
    write_stage_folder(
        out,
        config,
        Origin("mvl checkpoint import", {"model": folder.resolve()}, drawn),
        Streamed(
            import_tasks(table, source),
            source.read,
            source.sha256,
            {"files": files_identity(folder), "seed": seed},
        ),
        tokenizer if tokenizer.is_file() else None,
        report,
    )


def import_tasks(table: NameTable, source: PublishedFolder, prefix: str = "") -> list[Task]:
    """The work of an import; inputs are named `prefix` and the published name."""
    return [
        Task(
            tuple(prefix + slot.name for slot in rule.published),
            {
                slot.name: TensorSpec(source.tensors[rule.published[0].name].dtype, slot.shape)
                for slot in rule.stored
            },
            rule.to_stored,
        )
        for rule in table.rules
    ]


def grown_sentence(model: ModelConfig, rows: int, seed: int) -> str:
    """How vocabulary rows that the source lacks were drawn."""
    return (
        f"rows {rows} to {model.padded_vocab_size - 1} of embedding and output matrix: the mean of "
        f"the published rows plus normal noise of {model.decoder.init_std:g}, seed {seed}"
    )


def _stage(source: PublishedFolder, model: ModelConfig, out: Path) -> StageConfig:
    """A stage that has the folder's sizes and trains nothing yet.

    Raises:
        ConfigError: such a model breaks a rule of this project.
    """
    dtypes = {spec.dtype.itemsize for spec in source.tensors.values()}
    config = StageConfig(
        name="import",
        precision=Precision.fp32 if dtypes == {4} else Precision.bf16,
        model=model,
        data=DataConfig(
            root=str(out.resolve()),
            blend={_NO_DATA: 1.0},
            sequence_length=source.config.get("max_sequence_length", 4096),
            tile_size=source.config["force_image_size"],
            max_tiles=source.config.get("max_num_tiles", 12),
        ),
        optimizer=OptimizerConfig(lr=2e-5),
        train=TrainConfig(trainable=list(Part), steps=1, global_batch=1),
    )
    problems = check_stage(config)
    if problems:
        raise ConfigError([f"{source.folder}: {problem}" for problem in problems])
    return config


def _check_model(ours: ModelConfig, theirs: ModelConfig, where: Path, like: Path | None) -> None:
    """Raise ConversionError where a stage's model is not the published one.

    The stage's vocabulary may be larger.
    """
    differing = [
        *differing_keys("decoder", ours.decoder, theirs.decoder),
        *differing_keys("encoder", ours.encoder, theirs.encoder),
        *differing_keys("projector", ours.projector, theirs.projector),
    ]
    if ours.padded_vocab_size < theirs.padded_vocab_size:
        differing.append(
            f"padded_vocab_size is {ours.padded_vocab_size}, at least {theirs.padded_vocab_size} "
            "are published"
        )
    if differing:
        listed = "\n  ".join(differing)
        raise ConversionError(f"the model of {like} is not that of {where}:\n  {listed}")


def differing_keys(section: str, ours: Any, theirs: Any) -> list[str]:
    """Keys of two sections of one kind that differ, in words."""
    return [
        f"{section}.{field.name} is {getattr(ours, field.name)!r}, published is "
        f"{getattr(theirs, field.name)!r}"
        for field in fields(ours)
        if field.name not in _FREE and getattr(ours, field.name) != getattr(theirs, field.name)
    ]
