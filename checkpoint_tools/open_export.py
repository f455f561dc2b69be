"""An exported folder opened for generation and evaluation: this project's model, its weights read
back from the published files, its data settings from the config files beside them.

A quantized release is computed as its kernels would: weights decoded from codes and scales, the
inputs of those linears quantized with the scales that lie there (`decode`). On a CPU all is
computed in float32, whatever type the weights have on disk; elsewhere in that type.

Refuses folders that are damaged, incomplete or of another architecture (see `PublishedFolder`), and
a stage file whose model is another. Hashes are not looked at: that is what `certify` does.
Costs the model once in memory and one read of the folder.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.decode import fake_quantized, held_of, input_scale, read_decoded
from checkpoint_tools.errors import ConversionError
from checkpoint_tools.explain import check_published_folder
from checkpoint_tools.import_hf import differing_keys
from checkpoint_tools.name_rules import Growth, name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import PUBLISHED_TOKENIZER, PublishedFolder, read_json
from checkpoint_tools.quantized_layout import Quantization, described
from checkpoint_tools.reference import parameter_of, quantized_linears
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import OptimizerConfig, Part, Precision, StageConfig, TrainConfig
from megatron_vl.config.schema_data import DataConfig, FrameLabels, Tiling, VideoConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.data.tokenizer import Tokenizer
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.infer.model import OpenModel
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.calibrate import exchanged_inputs, plain_model

_IMAGES, _PROCESSOR = "preprocessor_config.json", "processor_config.json"
_PRECISIONS = {"bfloat16": Precision.bf16, "float32": Precision.fp32}


@contextlib.contextmanager
def open_export(folder: Path, like: Path | None = None) -> Iterator[OpenModel]:
    """Open an exported folder.

    Args:
        like: a stage file; its data section then takes the place of the folder's own settings.

    Raises:
        ConversionError, NamesError: see the module.
        FileNotFoundError: the folder has no tokenizer.
    """
    published = PublishedFolder(folder)
    tokenizer = Tokenizer.load(folder / PUBLISHED_TOKENIZER)
    rows = model_of(published.config)
    model = replace(rows, vocab_size=min(tokenizer.vocab_size, rows.padded_vocab_size))
    check_published_folder(published, name_table(rows))
    growth = Growth(model.padded_vocab_size, model.encoder.num_prefix_tokens)
    table = name_table(model, growth)
    chosen, stored = described(published.config), published.config["torch_dtype"]
    if stored not in _PRECISIONS:
        raise ConversionError(f"config.json says torch_dtype {stored!r}; known: {[*_PRECISIONS]}")
    on_cpu = PLATFORM.device_type == "cpu"
    precision = Precision.fp32 if on_cpu else _PRECISIONS[stored]
    config = _stage(published, model, like, precision)
    with plain_model(config, precision) as module:
        _fill(module, published, table, chosen)
        kind = f"{chosen.format} ({chosen.layout})" if chosen else stored
        origin = f"exported folder {folder}: {kind} weights, computed in {precision.value}"
        with _quantized_inputs(module, published, table, chosen):
            yield OpenModel(module, config, origin, tokenizer)


def _stage(
    published: PublishedFolder, model: ModelConfig, like: Path | None, precision: Precision
) -> StageConfig:
    """A stage with the folder's model, and its data settings or those of a stage file."""
    if like is not None:
        config = load_stage(like)
        differing = [
            line
            for part in ("decoder", "encoder", "projector")
            for line in differing_keys(part, getattr(config.model, part), getattr(model, part))
        ]
        if differing:
            listed = "\n  ".join(differing)
            raise ConversionError(
                f"the model of {like} is not that of {published.folder}:\n  {listed}"
            )
        return replace(config, model=model, precision=precision)
    images, texts = (read_json(published.folder / name) for name in (_IMAGES, _PROCESSOR))
    tiling = Tiling.area_weighted if images.get("area_weighted") else Tiling.published
    labels = FrameLabels.newline if texts.get("frame_separator", "\n") else FrameLabels.joined
    return StageConfig(
        name="release",
        precision=precision,
        model=model,
        data=DataConfig(
            root=str(published.folder),
            blend={},
            sequence_length=published.config["max_sequence_length"],
            tile_size=published.config["force_image_size"],
            max_tiles=published.config["max_num_tiles"],
            tiling=tiling,
            video=VideoConfig(labels=labels),
        ),
        optimizer=OptimizerConfig(lr=0.0),
        train=TrainConfig(trainable=list(Part), steps=1, global_batch=1),
    )


@torch.no_grad()
def _fill(
    module: VisionLanguageModel,
    published: PublishedFolder,
    table: NameTable,
    chosen: Quantization | None,
) -> None:
    parameters = dict(module.named_parameters())
    for rule in table.rules:
        tensors = [read_decoded(published.read, s.name, rule, chosen) for s in rule.published]
        pieces = rule.to_stored(tensors)
        parameters.pop(parameter_of(rule)).copy_(torch.cat(pieces) if pieces[1:] else pieces[0])
    assert not parameters, f"no published tensor is {next(iter(parameters))}"


def _quantized_inputs(
    module: VisionLanguageModel,
    published: PublishedFolder,
    table: NameTable,
    chosen: Quantization | None,
) -> contextlib.AbstractContextManager[None]:
    """While open, the quantized linears see their inputs as a quantized product does."""
    if chosen is None:
        return contextlib.nullcontext()
    scales = {}
    for name, rule in quantized_linears(table).items():
        # Query, key and value read one input and share its scale.
        first = rule.published[0].name.removesuffix(".weight")
        held = held_of(published.read, first, rule, chosen)
        scales[name] = input_scale(held, first, chosen).to(PLATFORM.device)
    return exchanged_inputs(module, scales, partial(_exchange, scales, chosen))


def _exchange(
    scales: dict[str, Tensor], chosen: Quantization, name: str, input_LBH: Tensor
) -> Tensor:
    return fake_quantized(input_LBH, scales[name], chosen)
