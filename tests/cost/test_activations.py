"""Activation bytes against tensors that are alive in a step, and by hand."""

from pathlib import Path

import pytest
import torch

from megatron_vl.config.load import load_stage
from megatron_vl.cost.activations import activation_bytes, most_units
from megatron_vl.train.step import count, run_batch
from tests.conftest import LAPTOP, REPOSITORY
from tests.support.memory import LiveBytes, SavedBytes
from tests.support.packs import pack_of_documents, picture_documents, run_pack
from tests.support.ranks import RankPool
from tests.train.jobs import drawn

FACTOR = 1.3
"""How far the estimate may be off, either way; `cost.activations` states it."""
SETTINGS = {
    "fp32": [],
    "bf16": ["precision=bf16"],
    "recompute": ["recompute.decoder=8", "recompute.encoder=4"],
    "some-mamba": ["recompute.decoder=4", "recompute.kinds=[mamba]", "recompute.encoder=2"],
    "projector": ["train.trainable=[projector]"],
    "decoder": ["train.trainable=[decoder]"],
    "mamba-alone": ["model.decoder.pattern=MMMM", "model.encoder.num_layers=1"],
    "no-mamba": ["model.decoder.pattern='-*-*'", "model.encoder.num_layers=1"],
}
LENGTHS, TILES = (250, 262), (13, 13)


def kept_and_most(file: Path, overrides: list[str]) -> tuple[int, int]:
    """Bytes that autograd keeps of a pack full of pictures, and the most alive in a step."""
    config = load_stage(file, overrides)
    trainee = drawn(config)
    generator = torch.Generator().manual_seed(3)
    documents, pictures = picture_documents(config, LENGTHS, TILES, generator)
    pack = pack_of_documents(config, documents, pictures, config.data.sequence_length)
    with SavedBytes(trainee.module.parameters()) as saved:
        losses_BL = run_pack(trainee.wrapped.module, pack, with_labels=True)
    kept = saved.total
    del losses_BL
    counts = count([pack], trainee)
    buffers = [buffer.grad_data for buffer in trainee.wrapped.buffers]
    with LiveBytes([*trainee.module.parameters(), *buffers]) as live:
        run_batch([pack], counts, trainee, config, forward_only=False)
    return kept, live.peak


@pytest.mark.distributed
@pytest.mark.parametrize("name", SETTINGS)
def test_against_a_step_on_this_machine(ranks: RankPool, name: str) -> None:
    overrides = ["parallel.data=1", "data.max_tiles_per_pack=26", *SETTINGS[name]]
    file = LAPTOP / "stage1.yaml"
    ((kept, most),) = ranks.run(1, kept_and_most, file, overrides)
    expected = activation_bytes(load_stage(file, overrides), 0)
    assert expected.kept / FACTOR < kept < expected.kept * FACTOR
    assert expected.total / FACTOR < most < expected.total * FACTOR


def test_the_published_model_by_hand() -> None:
    """Stage 1 of the 12B: 16384 tokens, 64 tiles, TP8 with sequence parallelism, BF16 widths."""
    config = load_stage(REPOSITORY / "stages/nano_12b_v2_vl/stage1.yaml", ["recompute.encoder=0"])
    assert most_units(config) == 64
    found = activation_bytes(config, 0)
    stream, tokens = 2048 * 5120, 2048  # a tensor rank's rows of 16384, and its columns' share
    mamba = 2 * stream + tokens * (22656 + 12288 + 3 * 10240)
    mlp = 2 * stream + 2 * tokens * 20480
    attention = 2 * stream + tokens * (2 * 5120 + 2048)
    decoder = 28 * (mamba + mlp) + 6 * attention + 3 * stream
    assert found.decoder == 2 * decoder
    # A state of 10240 x 128 a chunk of 128 tokens, an eighth of it, in float32.
    assert found.mamba_states == 28 * (16384 // 128) * 10240 * 128 // 8 * 4
    assert found.logits == 3 * 4 * 4096 * 132096 // 8
    layer = 64 * 1040 * (4 * 1280 + (4 * 1280 + 2 * 5120) // 8)
    assert found.encoder == 2 * (32 * layer + 64 * 1024 * 768 + 64 * 1040 * 1280)


def test_a_teacher_leaves_its_last_states_of_every_pack() -> None:
    path = REPOSITORY / "stages/nano_12b_v2_vl/qad_nvfp4.yaml"
    taught = activation_bytes(load_stage(path), 0)
    alone = activation_bytes(load_stage(path, ["distill.student=none"]), 0)
    assert taught.decoder - alone.decoder == 2 * 2 * 16384 // 8 * 5120


def test_what_makes_it_less() -> None:
    stage2 = REPOSITORY / "stages/nano_12b_v2_vl/stage2.yaml"
    whole = activation_bytes(load_stage(stage2), 0)
    # Four of eight packs of a rank are under way on the first of four pipeline stages.
    piped = ["parallel.pipeline=4", "parallel.first_stage_layers=14", "parallel.data=8"]
    first, last = (activation_bytes(load_stage(stage2, piped), stage) for stage in (0, 3))
    assert first.encoder == 4 * whole.encoder
    assert last.encoder == last.projector == first.logits == 0
    assert last.logits == whole.logits
    # Pruned videos leave room for more frames in the same pack.
    pruned = ["data.video.evs_rate=[0.0,0.5]", "data.max_tiles_per_pack=0"]
    assert most_units(load_stage(stage2, pruned)) == 2 * most_units(load_stage(stage2))
