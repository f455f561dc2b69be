"""A random model that vLLM can build, imported by this project's own tools.

vLLM takes encoders by timm name alone, so the smallest is vit_small (384 wide, 12 layers); the
decoder has one of each layer kind. 23 M parameters, drawn far from zero and from each other.
"""

import json
import random
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.published_config import TokenIds, published_config
from checkpoint_tools.published_folder import CONFIG_FILE, PUBLISHED_TOKENIZER, SINGLE_FILE
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
TILE = 64


def stage() -> StageConfig:
    """Its sizes."""
    return StageConfig(
        name="vit_small",
        model=ModelConfig(
            vocab_size=VOCABULARY,
            padded_vocab_size=VOCABULARY,
            decoder=DecoderConfig(
                pattern="M-M*-",
                hidden_size=128,
                ffn_hidden_size=256,
                num_attention_heads=4,
                num_query_groups=2,
                head_dim=32,
                mamba_num_heads=8,
                mamba_head_dim=32,
                mamba_state_dim=16,
                mamba_num_groups=2,
                mamba_chunk_size=16,
            ),
            encoder=EncoderConfig(
                num_layers=12,
                hidden_size=384,
                ffn_hidden_size=1536,
                num_attention_heads=6,
                patch_size=16,
                position_grid=8,
                num_prefix_tokens=8,
            ),
            projector=ProjectorConfig(ffn_hidden_size=512),
        ),
        data=DataConfig(
            root="nowhere", blend={"none": 1.0}, sequence_length=1024, tile_size=TILE, max_tiles=12
        ),
        optimizer=OptimizerConfig(lr=1e-4),
        train=TrainConfig(trainable=list(Part), steps=1, global_batch=1),
    )


def make_stage(folder: Path) -> Path:
    """Draw and import; returns the stage folder."""
    config, drawn = stage(), folder / "drawn"
    drawn.mkdir(parents=True)
    tokenizer = _tokenizer(folder / "tokenizer.json")
    save_file(_tensors(config.model), drawn / SINGLE_FILE, metadata={"format": "pt"})
    ids = TokenIds.of(Tokenizer(tokenizer))
    said = published_config(config, VOCABULARY, "float32", ids)
    (drawn / CONFIG_FILE).write_text(json.dumps(said))
    (drawn / PUBLISHED_TOKENIZER).write_text(tokenizer)
    import_folder(drawn, folder / "stage", None, 1, lambda progress: None)
    return folder / "stage"


def _tensors(model: ModelConfig) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(7)

    def draw(name: str, shape: tuple[int, ...]) -> Tensor:
        noise = torch.randn(shape, generator=generator)
        if name.endswith("A_log"):
            return torch.log(1 + 15 * torch.rand(shape, generator=generator))
        if name.endswith("dt_bias"):
            return noise - 3
        if ("norm" in name and name.endswith("weight")) or name.endswith((".D", "mlp1.0.weight")):
            return 1 + 0.2 * noise
        if "embeddings" in name or name.endswith(("pos_embed", "cls_token.token")):
            return 0.5 * noise
        return noise * (1.2 / shape[-1] ** 0.5 if len(shape) > 1 else 0.1)

    return {name: draw(name, slot.shape) for name, slot in name_table(model).published().items()}


def _tokenizer(path: Path) -> str:
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdefgh", k=draw.randint(2, 7))) for _ in range(400)]
    texts = [" ".join(draw.choices(words, k=30)) for _ in range(60)]
    train_tokenizer(texts, vocab_size=VOCABULARY, path=path)
    return path.read_text()
