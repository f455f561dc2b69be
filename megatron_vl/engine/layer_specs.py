"""Two layer specs, one set of parameter names.

The torch spec runs anywhere; the Transformer Engine spec where that package is. Their modules store
the same parameters under the same names, so checkpoints pass between them; the test tree holds the
committed list both are compared with.

Source of the structure: megatron-core's `mamba_stack_spec` for the decoder, RADIO's pre-norm
transformer for the encoder.
"""

from dataclasses import dataclass, replace

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.ssm.mamba_layer import MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_vl.engine.fp8_linear import (
    Fp8LayerNormColumnParallelLinear,
    Fp8RowParallelLinear,
)
from megatron_vl.engine.hybrid_stack import HybridStack, HybridStackSubmodules, PackedMambaMixer
from megatron_vl.engine.platform import Platform
from megatron_vl.engine.recompute import (
    RecomputableMambaLayer,
    RecomputableMLPLayer,
    RecomputableTransformerLayer,
)
from megatron_vl.engine.torch_layers import CoreAttention, Norm


@dataclass(frozen=True)
class Blocks:
    """The four modules a spec is made of.

    Attributes:
        norm_linear: a norm fused with the column-parallel linear it feeds.
        row_linear: a row-parallel linear.
        core_attention: softmax(QK)V over packed or plain sequences.
        norm: a norm of its own.
    """

    norm_linear: type
    row_linear: type
    core_attention: type
    norm: type


TORCH_BLOCKS = Blocks(
    norm_linear=Fp8LayerNormColumnParallelLinear,
    row_linear=Fp8RowParallelLinear,
    core_attention=CoreAttention,
    norm=Norm,
)


def transformer_engine_blocks() -> Blocks:
    """Transformer Engine's modules; importable only where that package is installed."""
    from megatron.core.extensions.transformer_engine import (
        TEDotProductAttention,
        TELayerNormColumnParallelLinear,
        TENorm,
        TERowParallelLinear,
    )

    return Blocks(
        norm_linear=TELayerNormColumnParallelLinear,
        row_linear=TERowParallelLinear,
        core_attention=TEDotProductAttention,
        norm=TENorm,
    )


def blocks_for(platform: Platform) -> Blocks:
    """Transformer Engine's modules where they are, torch's elsewhere."""
    return transformer_engine_blocks() if platform.has_transformer_engine else TORCH_BLOCKS


def open_blocks(platform: Platform) -> Blocks:
    """The platform's modules with the project's own linears, whose operands can be reached."""
    linears = {"norm_linear": TORCH_BLOCKS.norm_linear, "row_linear": TORCH_BLOCKS.row_linear}
    return replace(blocks_for(platform), **linears)


def _attention(blocks: Blocks, mask: AttnMaskType) -> ModuleSpec:
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": mask},
        submodules=SelfAttentionSubmodules(
            linear_qkv=blocks.norm_linear,
            core_attention=blocks.core_attention,
            linear_proj=blocks.row_linear,
        ),
    )


def mlp_submodules(blocks: Blocks) -> MLPSubmodules:
    """Norm and first linear, second linear: an MLP layer's and the projector's parts."""
    return MLPSubmodules(linear_fc1=blocks.norm_linear, linear_fc2=blocks.row_linear)


def hybrid_decoder_spec(blocks: Blocks, mamba_chunk_size: int) -> ModuleSpec:
    """Spec of the hybrid decoder stack; which layer stands where comes from the pattern."""
    return ModuleSpec(
        module=HybridStack,
        submodules=HybridStackSubmodules(
            mamba_layer=ModuleSpec(
                module=RecomputableMambaLayer,
                submodules=MambaLayerSubmodules(
                    mixer=ModuleSpec(
                        module=PackedMambaMixer,
                        params={"chunk_size": mamba_chunk_size},
                        submodules=MambaMixerSubmodules(
                            in_proj=blocks.norm_linear, out_proj=blocks.row_linear
                        ),
                    ),
                    mamba_bda=get_bias_dropout_add,
                ),
            ),
            attention_layer=ModuleSpec(
                module=RecomputableTransformerLayer,
                submodules=TransformerLayerSubmodules(
                    self_attention=_attention(blocks, AttnMaskType.causal),
                    self_attn_bda=get_bias_dropout_add,
                ),
            ),
            mlp_layer=ModuleSpec(
                module=RecomputableMLPLayer,
                submodules=TransformerLayerSubmodules(
                    mlp=ModuleSpec(module=MLP, submodules=mlp_submodules(blocks)),
                    mlp_bda=get_bias_dropout_add,
                ),
            ),
            final_norm=blocks.norm,
        ),
    )


def encoder_layer_spec(blocks: Blocks) -> ModuleSpec:
    """Spec of one vision transformer layer: full attention, then an MLP, both pre-norm."""
    return ModuleSpec(
        module=RecomputableTransformerLayer,
        submodules=TransformerLayerSubmodules(
            self_attention=_attention(blocks, AttnMaskType.no_mask),
            self_attn_bda=get_bias_dropout_add,
            mlp=ModuleSpec(module=MLP, submodules=mlp_submodules(blocks)),
            mlp_bda=get_bias_dropout_add,
        ),
    )
