"""A stage folder with data and a random model that answers firmly, to calibrate, release, certify.

The output matrix is close to the embedding, and layers add little: most places have a clear first
choice, so that quantized copies keep within the published bounds; pictures still move the logits.
"""

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.import_hf import import_folder
from megatron_vl.config.load import to_yaml
from megatron_vl.config.schema import Precision, StageConfig
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.data.tokenizer import Tokenizer
from tests.checkpoint_tools.conftest import quiet
from tests.checkpoint_tools.published import random_tensors, tiny_stage, write_published

_LAYER_OUTPUTS = ("out_proj.weight", "down_proj.weight", "o_proj.weight")
_HEAD = "language_model.lm_head.weight"
_EMBEDDING = "language_model.backbone.embeddings.weight"


def served_config(data_root: Path) -> StageConfig:
    """The tiny stage over the small data's sources."""
    tokenizer = Tokenizer.load(data_root / TOKENIZER_FILE)
    stage = tiny_stage(vocabulary=tokenizer.vocab_size)
    size = tokenizer.vocab_size
    stage.model = replace(stage.model, vocab_size=size, padded_vocab_size=size)
    stage.data = replace(
        stage.data,
        root=str(data_root),
        blend={"qa": 0.5, "clips": 0.3, "text": 0.2},
        sequence_length=640,
    )
    stage.train.global_batch = 2
    stage.precision = Precision.fp32
    return stage


def served_tensors(stage: StageConfig) -> dict[str, Tensor]:
    """Published weights of that model."""
    tensors = random_tensors(stage.model, seed=5)
    for name in tensors:
        if name.endswith(_LAYER_OUTPUTS):
            tensors[name] *= 0.04
    noise = torch.randn(tensors[_HEAD].shape, generator=torch.Generator().manual_seed(6))
    tensors[_HEAD] = 0.5 * tensors[_EMBEDDING] + 0.02 * noise
    return tensors


def served_stage(base: Path, data_root: Path) -> Path:
    """The stage folder."""
    stage = served_config(data_root)
    text = (data_root / TOKENIZER_FILE).read_text()
    like = base / "tiny.yaml"
    like.write_text(to_yaml(stage))
    folder = write_published(base / "published", stage, served_tensors(stage), text)
    import_folder(folder, base / "stage", like, 1, quiet)
    return base / "stage"
