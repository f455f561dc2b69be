"""The `model` section of a stage file; see `schema`."""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING


class LayerKind(Enum):
    """A kind of decoder layer."""

    mamba = "mamba"
    mlp = "mlp"
    attention = "attention"


LAYER_KINDS = {"M": LayerKind.mamba, "-": LayerKind.mlp, "*": LayerKind.attention}
"""The kind behind each character of a decoder pattern."""


@dataclass
class DecoderConfig:
    """The hybrid Mamba-2/Transformer language decoder."""

    pattern: str = MISSING
    """One character a layer: M is Mamba-2, - is an MLP, * is attention. [string; model]"""
    hidden_size: int = MISSING
    """Width of the residual stream. [channels; model]"""
    ffn_hidden_size: int = MISSING
    """Inner width of an MLP layer (up, squared ReLU, down; no gate). [channels; model]"""
    num_attention_heads: int = MISSING
    """Query heads of an attention layer. [heads; model]"""
    num_query_groups: int = MISSING
    """Key/value heads of an attention layer; divides the query heads. [heads; model]"""
    head_dim: int = MISSING
    """Width of one attention head; query width is heads times this. [channels; model]"""
    mamba_num_heads: int = MISSING
    """Heads of the state-space layer; a multiple of parallel.tensor. [heads; model]"""
    mamba_head_dim: int = MISSING
    """Channels of one state-space head. [channels; model]"""
    mamba_state_dim: int = MISSING
    """State size N of each state-space channel. [channels; model]"""
    mamba_num_groups: int = MISSING
    """Groups that share B and C; divides the heads, a multiple of parallel.tensor. [groups;
    model]"""
    mamba_chunk_size: int = 128
    """Chunk length of the SSD scan: speed and memory, not results. [tokens; kernels]"""
    norm_epsilon: float = 1e-5
    """Epsilon of every RMSNorm of the decoder. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weight matrices. [1; model]"""


@dataclass
class EncoderConfig:
    """The RADIO vision transformer."""

    num_layers: int = MISSING
    """Transformer layers. [layers; model]"""
    hidden_size: int = MISSING
    """Width of the residual stream. [channels; model]"""
    ffn_hidden_size: int = MISSING
    """Inner width of the GELU MLP. [channels; model]"""
    num_attention_heads: int = MISSING
    """Attention heads; head width is hidden_size over this. [heads; model]"""
    patch_size: int = 16
    """Edge of a square patch; divides data.tile_size. [pixels; model]"""
    position_grid: int = 128
    """Edge of the learned position table; a tile's grid is cropped from its top left. [patches;
    model]"""
    num_prefix_tokens: int = 16
    """Class and register tokens, prepended and dropped after the last layer. [tokens; model]"""
    norm_epsilon: float = 1e-6
    """Epsilon of every LayerNorm of the encoder. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weight matrices. [1; model]"""


@dataclass
class ProjectorConfig:
    """RMSNorm, linear, squared ReLU, linear: from 4 shuffled patches to one decoder token."""

    ffn_hidden_size: int = MISSING
    """Inner width. [channels; model]"""
    norm_epsilon: float = 1e-5
    """Epsilon of the input RMSNorm. [1; model]"""
    init_std: float = 0.02
    """Standard deviation of freshly drawn weights. [1; model]"""


@dataclass
class ModelConfig:
    """The composed vision-language model."""

    vocab_size: int = MISSING
    """Tokenizer entries, added special tokens included. [tokens; model, data]"""
    padded_vocab_size: int = MISSING
    """Rows of the embedding and output matrices; at least vocab_size, a multiple of
    parallel.tensor. [tokens; model]"""
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    """The language decoder. [section; model]"""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    """The vision encoder. [section; model]"""
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    """The projector between them. [section; model]"""
