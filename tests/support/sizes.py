"""Model sections the tests count: the published 12B sizes, and one small enough for paper."""

from dataclasses import replace

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema_model import (
    DecoderConfig,
    EncoderConfig,
    ModelConfig,
    ProjectorConfig,
)
from tests.conftest import REPOSITORY

STAGE_12B = REPOSITORY / "stages" / "nano_12b_v2_vl" / "stage1.yaml"


def full_size() -> ModelConfig:
    """The 12B recipe's model, with 131072 vocabulary rows."""
    return replace(load_stage(STAGE_12B).model, vocab_size=131072, padded_vocab_size=131072)


PATTERN_12B = full_size().decoder.pattern


def small(pattern: str = "M-*") -> ModelConfig:
    """Sizes for sums on paper."""
    return ModelConfig(
        vocab_size=10,
        padded_vocab_size=12,
        decoder=DecoderConfig(
            pattern=pattern,
            hidden_size=4,
            ffn_hidden_size=6,
            num_attention_heads=2,
            num_query_groups=1,
            head_dim=3,
            mamba_num_heads=4,
            mamba_head_dim=2,
            mamba_state_dim=3,
            mamba_num_groups=2,
            mamba_chunk_size=8,
        ),
        encoder=EncoderConfig(
            num_layers=2,
            hidden_size=4,
            ffn_hidden_size=8,
            num_attention_heads=2,
            patch_size=2,
            position_grid=4,
            num_prefix_tokens=2,
        ),
        projector=ProjectorConfig(ffn_hidden_size=5),
    )
