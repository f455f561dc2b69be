"""Tiny published folders of random weights, written with the safetensors library."""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from checkpoint_tools.name_rules import name_table
from checkpoint_tools.published_config import TokenIds, published_config
from checkpoint_tools.published_folder import CONFIG_FILE, INDEX_FILE, PUBLISHED_TOKENIZER
from megatron_vl.config.schema import OptimizerConfig, Part, StageConfig, TrainConfig
from megatron_vl.config.schema_data import DataConfig
from megatron_vl.config.schema_model import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProjectorConfig,
)
from megatron_vl.data.tokenizer import Tokenizer, train_tokenizer

VOCABULARY = 512


def tiny_stage(
    pattern: str = "M-M*-MM-", vocabulary: int = VOCABULARY, prefix: int = 16
) -> StageConfig:
    """A stage of a model with two of each thing that could be swapped."""
    return StageConfig(
        name="tiny",
        model=ModelConfig(
            vocab_size=VOCABULARY,
            padded_vocab_size=VOCABULARY,
            decoder=DecoderConfig(
                pattern=pattern,
                hidden_size=64,
                ffn_hidden_size=144,
                num_attention_heads=4,
                num_query_groups=2,
                head_dim=24,
                mamba_num_heads=8,
                mamba_head_dim=16,
                mamba_state_dim=20,
                mamba_num_groups=2,
                mamba_chunk_size=16,
            ),
            encoder=EncoderConfig(
                num_layers=2,
                hidden_size=48,
                ffn_hidden_size=96,
                num_attention_heads=4,
                patch_size=8,
                position_grid=12,
                num_prefix_tokens=prefix,
            ),
            projector=ProjectorConfig(ffn_hidden_size=80),
        ),
        data=DataConfig(
            root="nowhere", blend={"none": 1.0}, sequence_length=512, tile_size=32, max_tiles=4
        ),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(trainable=list(Part), steps=1, global_batch=1),
    )


def random_tensors(model: ModelConfig, seed: int = 7) -> dict[str, Tensor]:
    """Published tensors, float32: far from zero, one and each other, yet a model that answers."""
    generator = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            return torch.log(1 + 15 * torch.rand(shape, generator=generator))
        if name.endswith("dt_bias"):
            return 3 * noise - 6  # many steps below the 0.001 that transformers clamps dt at
        if ("norm" in name and name.endswith("weight")) or name.endswith((".D", "mlp1.0.weight")):
            return 1 + 0.2 * noise
        if "embeddings" in name or name.endswith(("pos_embed", "cls_token.token")):
            return 0.5 * noise
        return noise * (1.3 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)

    return {name: draw(name, slot.shape) for name, slot in name_table(model).published().items()}


def tokenizer_text(folder: Path) -> str:
    """A tokenizer.json of VOCABULARY entries, trained on words nobody says."""
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=30)) for _ in range(60)]
    path = folder / "trained.json"
    train_tokenizer(texts, vocab_size=VOCABULARY, path=path)
    return path.read_text()


def write_published(
    folder: Path, stage: StageConfig, tensors: dict[str, Tensor], tokenizer: str, shards: int = 2
) -> Path:
    """Write the folder; tensors are dealt out to the shards one by one."""
    folder.mkdir(parents=True)
    names = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    weight_map = {name: names[at % shards] for at, name in enumerate(tensors)}
    for file in names:
        held = {name: tensors[name].contiguous() for name in tensors if weight_map[name] == file}
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX_FILE).write_text(json.dumps(index))
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    ids = TokenIds.of(Tokenizer(tokenizer))
    config = published_config(stage, stage.model.vocab_size, dtype, ids)
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    (folder / PUBLISHED_TOKENIZER).write_text(tokenizer)
    return folder


def read_all(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards, with the safetensors library."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found
