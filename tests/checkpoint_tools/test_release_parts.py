"""A decoder and an encoder as folders of their own, and those that the repository carries."""

from pathlib import Path

import torch

from checkpoint_tools.name_rules import DECODER_PREFIX, Growth, name_table
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.release_parts import DTYPE, write_part
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import Part
from megatron_vl.data.tokenizer import VISION_TOKENS
from megatron_vl.model.initialize import draw_tensor
from tests.conftest import LAPTOP

RELEASED = LAPTOP / "released"


def test_a_part_is_written_and_read_back(tmp_path: Path) -> None:
    config = load_stage(LAPTOP / "stage1.yaml", ["parallel.data=1"])
    rows = config.model.vocab_size - len(VISION_TOKENS)
    table = name_table(config.model, Growth(rows, config.model.encoder.num_prefix_tokens))
    shapes = {slot.name: slot.shape for rule in table.rules for slot in rule.stored}
    drawn = {name: draw_tensor(name, shape, config.model, 3) for name, shape in shapes.items()}
    tokenizer = (RELEASED / "decoder" / "tokenizer.json").read_text()
    write_part(Part.decoder, config, drawn.__getitem__, tokenizer, tmp_path / "decoder")
    folder = PublishedFolder(tmp_path / "decoder")
    part = table.of_part(Part.decoder, DECODER_PREFIX)
    part.check_published(folder.shapes(), "the decoder")
    assert folder.config["vocab_size"] == rows
    for rule in part.rules:
        stored = rule.to_stored([folder.read(slot.name) for slot in rule.published])
        for slot, tensor in zip(rule.stored, stored, strict=True):
            kept = min(rows, len(tensor)) if "embedding" in slot.name else len(tensor)
            kept = rows if "output_layer" in slot.name else kept
            assert torch.equal(tensor[:kept], drawn[slot.name][:kept].to(DTYPE)), slot.name


def test_the_released_parts_are_small_and_of_the_recipes_model() -> None:
    files = [path for path in RELEASED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 10_000_000
    model = load_stage(LAPTOP / "stage0.yaml").model
    decoder, encoder = PublishedFolder(RELEASED / "decoder"), PublishedFolder(RELEASED / "encoder")
    assert decoder.config["vocab_size"] == model.vocab_size - len(VISION_TOKENS)
    for folder in (decoder, encoder):
        for name in folder.tensors:
            assert bool(folder.read(name).float().isfinite().all()), name
