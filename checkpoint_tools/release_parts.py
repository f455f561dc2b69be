"""A decoder and an encoder as folders of their own: what `mvl checkpoint assemble` starts from.

The laptop recipe starts as the published one does, from a released decoder (nemotron_h names) and a
released encoder (RADIO names). `make released` makes both, some megabytes that the repository
carries: the decoder is the last stage of `stages/laptop_start`, trained by the usual loop on text
and code, the encoder is trained here on what each patch shows (`train/dense.py`). The decoder's
folder holds the tokenizer it was trained with and lacks the rows of the vision tokens, which
assembling adds, as it does at 12B.

    python -m checkpoint_tools.release_parts runs/laptop_start stages/laptop/released

Refuses an OUT that holds something else than such folders. Ten to twenty minutes on one core.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.name_rules import DECODER_PREFIX, ENCODER_PREFIX, Growth, name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_config import TokenIds, published_config
from checkpoint_tools.published_folder import CONFIG_FILE, PUBLISHED_TOKENIZER, SINGLE_FILE
from checkpoint_tools.safetensors_file import SafetensorsWriter, TensorSpec
from checkpoint_tools.stage_source import open_stage
from megatron_vl.config.schema import Part, StageConfig
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.tokenizer import VISION_TOKENS, Tokenizer
from megatron_vl.infer.model import empty_model
from megatron_vl.train.dense import DenseSettings, pretrain_encoder

DTYPE = torch.bfloat16
_SECTIONS = {
    Part.decoder: ("llm_config", DECODER_PREFIX),
    Part.encoder: ("vision_config", ENCODER_PREFIX),
}


def release_decoder(run: Path, out: Path) -> None:
    """Write the decoder of a run's last done stage, and its tokenizer, as the folder `out`."""
    source = open_stage(run)
    source.check_digest()
    text = (Path(source.config.data.root) / TOKENIZER_FILE).read_text(encoding="utf-8")
    write_part(Part.decoder, source.config, source.checkpoint.read, text, out)
    (out / PUBLISHED_TOKENIZER).write_text(text, encoding="utf-8")


def release_encoder(
    config: StageConfig, settings: DenseSettings, out: Path, say: Callable[[str], None]
) -> None:
    """Pretrain the encoder of a stage's model and write it as the folder `out`."""
    text = (Path(config.data.root) / TOKENIZER_FILE).read_text(encoding="utf-8")
    with empty_model(config) as (module, groups):
        tensors = pretrain_encoder(module, groups, config, settings, say)
    write_part(Part.encoder, config, tensors.__getitem__, text, out)


def write_part(
    part: Part, config: StageConfig, read: Callable[[str], Tensor], tokenizer: str, out: Path
) -> None:
    """Write one part of a model as a published folder of one file, in bfloat16.

    Args:
        read: a stored tensor by its name.
        tokenizer: text of the tokenizer.json, for the ids that a config names.
    """
    section, prefix = _SECTIONS[part]
    rows = config.model.vocab_size - len(VISION_TOKENS)
    table = name_table(config.model, Growth(rows, config.model.encoder.num_prefix_tokens))
    tensors = _published(table.of_part(part, prefix), read)
    said = published_config(config, rows, "bfloat16", TokenIds.of(Tokenizer(tokenizer)))
    if out.exists() and not (out / CONFIG_FILE).is_file():
        raise ConversionError(f"{out} holds something else than a released part; name another")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    specs = {name: TensorSpec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}
    writer = SafetensorsWriter(out / SINGLE_FILE, specs)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    text: Mapping[str, Any] = said[section]
    (out / CONFIG_FILE).write_text(json.dumps(text, indent=2) + "\n", encoding="utf-8")


def _published(table: NameTable, read: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """A part's tensors by published name; weights in DTYPE, constants as they are."""
    found = {c.name: c.value.contiguous() for c in table.constants if c.written}
    for rule in table.rules:
        made = rule.to_published([read(slot.name) for slot in rule.stored])
        for slot, tensor in zip(rule.published, made, strict=True):
            found[slot.name] = tensor.to(DTYPE).contiguous()
    return found


def main() -> None:
    """Make both folders."""
    parser = argparse.ArgumentParser(prog="python -m checkpoint_tools.release_parts")
    parser.add_argument("run", type=Path, help="the run of stages/laptop_start")
    parser.add_argument("out", type=Path, help="where decoder/ and encoder/ are made")
    args = parser.parse_args()
    release_decoder(args.run, args.out / "decoder")
    torch.set_num_threads(1)
    config = open_stage(args.run).config
    release_encoder(
        config, DenseSettings(), args.out / "encoder", lambda line: print(line, flush=True)
    )
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: decoder and encoder, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
