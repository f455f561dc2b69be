"""From a stage's config to megatron-core's `TransformerConfig`s: decoder, encoder, projector.

Fusions that exist only as CUDA extensions are off: the Transformer Engine spec brings its own, the
torch spec has none. Weights are drawn by `model.initialize`, so megatron-core's own
initialisation, which depends on the layout, is off too.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.config.schema_model import ModelConfig


def _shared(precision: Precision, parallel: ParallelConfig) -> dict[str, Any]:
    in_bf16 = precision is not Precision.fp32  # FP8 is set on the built model: engine.fp8_state
    return {
        "bf16": in_bf16,
        "params_dtype": torch.bfloat16 if in_bf16 else torch.float32,
        "pipeline_dtype": torch.bfloat16 if in_bf16 else torch.float32,
        "tensor_model_parallel_size": parallel.tensor,
        "perform_initialization": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "apply_rope_fusion": False,
        "attention_softmax_in_fp32": True,
        "gated_linear_unit": False,
        "cuda_graph_scope": [],
    }


def decoder_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision
) -> TransformerConfig:
    """Config of the hybrid decoder, pipeline and sequence parallelism included."""
    decoder = model.decoder
    return TransformerConfig(
        **_shared(precision, parallel),
        num_layers=len(decoder.pattern),
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        num_query_groups=decoder.num_query_groups,
        kv_channels=decoder.head_dim,
        mamba_num_heads=decoder.mamba_num_heads,
        mamba_head_dim=decoder.mamba_head_dim,
        mamba_state_dim=decoder.mamba_state_dim,
        mamba_num_groups=decoder.mamba_num_groups,
        is_hybrid_model=True,
        normalization="RMSNorm",
        layernorm_epsilon=decoder.norm_epsilon,
        activation_func=squared_relu,
        add_bias_linear=False,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers or None,
        sequence_parallel=parallel.sequence,
    )


def encoder_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision
) -> TransformerConfig:
    """Config of the vision encoder: whole on the first pipeline stage, whole sequences.

    Context-parallel ranks share units, never one unit's sequence.
    """
    encoder = model.encoder
    return TransformerConfig(
        **_shared(precision, parallel),
        num_layers=encoder.num_layers,
        hidden_size=encoder.hidden_size,
        ffn_hidden_size=encoder.ffn_hidden_size,
        num_attention_heads=encoder.num_attention_heads,
        normalization="LayerNorm",
        layernorm_epsilon=encoder.norm_epsilon,
        activation_func=F.gelu,
        add_bias_linear=True,
        add_qkv_bias=True,
    )


def projector_config(
    model: ModelConfig, parallel: ParallelConfig, precision: Precision
) -> TransformerConfig:
    """Config of the projector: as wide at its end as the decoder."""
    return TransformerConfig(
        **_shared(precision, parallel),
        num_layers=1,
        hidden_size=model.decoder.hidden_size,
        ffn_hidden_size=model.projector.ffn_hidden_size,
        num_attention_heads=model.decoder.num_attention_heads,
        kv_channels=model.decoder.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.projector.norm_epsilon,
        activation_func=squared_relu,
        add_bias_linear=False,
    )
