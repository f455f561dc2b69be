"""`mvl checkpoint assemble`: a released decoder and a released encoder to a starting checkpoint.

The decoder folder holds nemotron_h names (`backbone.*`, `lm_head.weight`), the encoder folder RADIO
names (`radio_model.*`). What neither has is drawn, with the stage's seed and by the tensor's name:
- the projector, normal with its init_std (0.02 as published), as `model.initialize` draws it;
- vocabulary rows past the decoder's, see `transforms.grow_vocabulary`;
- prefix tokens in front of the encoder's, normal with its init_std, up to num_prefix_tokens.

Streams; refuses what import refuses, and releases whose sizes are not the stage's.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.import_hf import differing_keys, grown_sentence, import_tasks
from checkpoint_tools.name_rules import DECODER_PREFIX, ENCODER_PREFIX, Growth, name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_config import decoder_of, encoder_of
from checkpoint_tools.published_folder import CONFIG_FILE, PublishedFolder
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.stage_folder import Origin, Streamed, write_stage_folder
from checkpoint_tools.streaming import Report, Task
from checkpoint_tools.workspace import files_identity
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import Part, Precision, StageConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.model.initialize import draw_tensor

_DECODER, _ENCODER = "decoder/", "encoder/"
"""Prefixes that tell the inputs of the two folders apart."""


def assemble(decoder: Path, encoder: Path, out: Path, like: Path, report: Report) -> None:
    """Write the stage folder `out` for the stage file `like`."""
    config = load_stage(like)
    decoder_folder, encoder_folder = PublishedFolder(decoder), PublishedFolder(encoder)
    growth = _growth(config, decoder_folder, encoder_folder, like)
    table = name_table(config.model, growth)
    of_decoder = table.of_part(Part.decoder, DECODER_PREFIX)
    of_encoder = table.of_part(Part.encoder, ENCODER_PREFIX)
    for part, source in ((of_decoder, decoder_folder), (of_encoder, encoder_folder)):
        part.check_published(source.shapes(), str(source.folder))
        source.check_constants(part.constants)
    projector = _projector_tasks(table, config)

    def read(name: str) -> Tensor:
        if name.startswith(_DECODER):
            return decoder_folder.read(name.removeprefix(_DECODER))
        return encoder_folder.read(name.removeprefix(_ENCODER))

    tasks = [
        *import_tasks(of_decoder, decoder_folder, _DECODER),
        *import_tasks(of_encoder, encoder_folder, _ENCODER),
        *projector,
    ]
    expected = {_DECODER + name: digest for name, digest in decoder_folder.sha256.items()}
    expected |= {_ENCODER + name: digest for name, digest in encoder_folder.sha256.items()}
    origin = Origin(
        "mvl checkpoint assemble",
        {"decoder": decoder.resolve(), "encoder": encoder.resolve()},
        _drawn(config.model, growth),
    )
    identity = {part.name: files_identity(part) for part in (decoder, encoder)}
    streamed = Streamed(tasks, read, expected, identity)
    write_stage_folder(out, config, origin, streamed, None, report)


def _growth(
    config: StageConfig, decoder: PublishedFolder, encoder: PublishedFolder, like: Path
) -> Growth:
    """How many rows the releases have; raises ConversionError where their sizes are not the
    stage's."""
    model = config.model
    try:
        rows = decoder.config["vocab_size"]
        theirs = encoder_of(encoder.config)
        prefix = theirs.num_prefix_tokens
        differing = [
            *differing_keys("decoder", model.decoder, decoder_of(decoder.config)),
            *differing_keys(
                "encoder",
                replace(model.encoder, num_prefix_tokens=prefix),
                theirs,
            ),
        ]
    except KeyError as error:
        raise ConversionError(
            f"{decoder.folder / CONFIG_FILE} or {encoder.folder / CONFIG_FILE} lacks {error}"
        ) from error
    if differing:
        listed = "\n  ".join(differing)
        raise ConversionError(f"the model of {like} is not the released one:\n  {listed}")
    return Growth(rows, prefix, config.train.seed)


def _projector_tasks(table: NameTable, config: StageConfig) -> list[Task]:
    dtype = torch.float32 if config.precision is Precision.fp32 else torch.bfloat16

    def task(name: str, shape: tuple[int, ...]) -> Task:
        return Task(
            (),
            {name: TensorSpec(dtype, shape)},
            lambda _: [draw_tensor(name, shape, config.model, config.train.seed)],
        )

    slots = (rule.stored[0] for rule in table.rules if rule.part is Part.projector)
    return [task(slot.name, slot.shape) for slot in slots]


def _drawn(model: ModelConfig, growth: Growth) -> list[str]:
    seed = growth.seed
    said = [f"projector: normal with {model.projector.init_std:g}, norm at 1, seed {seed}"]
    if growth.vocabulary < model.padded_vocab_size:
        said.append(grown_sentence(model, growth.vocabulary, seed))
    missing = model.encoder.num_prefix_tokens - growth.prefix
    if missing:
        said.append(
            f"prefix tokens 0 to {missing - 1}, in front of the {growth.prefix} released: normal "
            f"with {model.encoder.init_std:g}, seed {seed}"
        )
    return said
