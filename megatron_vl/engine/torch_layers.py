"""The torch layer spec's building blocks: plain torch twins of three Transformer Engine modules.

They exist so that the same model runs where Transformer Engine does not (a laptop, a single GPU),
under the same parameter names: `layer_norm_weight` lives inside the linear it feeds, as Transformer
Engine's fused layer stores it, so a checkpoint of either spec loads into the other.

Shapes: S sequence (the local part under sequence parallelism), B batch, H hidden, T packed tokens,
N heads, G key/value heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_vl.engine.context_parallel import gather_keys_and_values
from megatron_vl.engine.packed import PackedSequence
from megatron_vl.kernels.attention import attend, attend_segments


def _norm_parameter(values: Tensor, config: TransformerConfig) -> nn.Parameter:
    """A replicated norm parameter; marked so that its gradient is summed over tensor ranks when
    each of them normalises its own part of the sequence."""
    parameter = nn.Parameter(values)
    parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
    return parameter


def normalize(
    hidden_SBH: Tensor, weight_H: Tensor, bias_H: Tensor | None, kind: str, epsilon: float
) -> Tensor:
    """RMSNorm or LayerNorm over the last axis, in float32 inside, in the input's type outside."""
    if kind == "RMSNorm":
        return F.rms_norm(hidden_SBH, weight_H.shape, weight_H, epsilon)
    return F.layer_norm(hidden_SBH, weight_H.shape, weight_H, bias_H, epsilon)


class Norm(nn.Module):
    """A norm of its own, for the decoder's end, built as megatron-core's specs build norms.

    Raises:
        ValueError: the config asks for a norm other than RMSNorm or LayerNorm.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.kind = _norm_kind(config)
        self.epsilon = eps
        device = torch.cuda.current_device()
        ones = torch.ones(hidden_size, device=device, dtype=config.params_dtype)
        self.weight = _norm_parameter(ones, config)
        self.bias = (
            _norm_parameter(torch.zeros_like(ones), config) if self.kind == "LayerNorm" else None
        )

    def forward(self, hidden_SBH: Tensor) -> Tensor:
        return normalize(hidden_SBH, self.weight, self.bias, self.kind, self.epsilon)


def _norm_kind(config: TransformerConfig) -> str:
    if config.normalization not in ("RMSNorm", "LayerNorm"):
        raise ValueError(f"normalization {config.normalization!r}: use RMSNorm or LayerNorm")
    return config.normalization


class LayerNormColumnParallelLinear(ColumnParallelLinear):
    """A norm, then a column-parallel linear: the twin of TELayerNormColumnParallelLinear."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, **kwargs: Any
    ) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.norm_kind = _norm_kind(config)
        device = torch.cuda.current_device()
        ones = torch.ones(input_size, device=device, dtype=config.params_dtype)
        self.layer_norm_weight = _norm_parameter(ones, config)
        self.layer_norm_bias = (
            _norm_parameter(torch.zeros_like(ones), config)
            if self.norm_kind == "LayerNorm"
            else None
        )

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        normed_SBH = normalize(
            input_,
            self.layer_norm_weight,
            self.layer_norm_bias,
            self.norm_kind,
            self.config.layernorm_epsilon,
        )
        return super().forward(normed_SBH, *args, **kwargs)


class CoreAttention(nn.Module):
    """Scaled dot-product attention, per document: the twin of TEDotProductAttention.

    A pack is attended document by document (see `kernels.attention`). Under context parallelism the
    queries of this rank's shard see gathered keys and values: the whole pack's, one layer at a
    time.
    """

    # Read by megatron-core's checkpoint code, which treats core attention as a stateful module.
    current_max_attn_logits = None

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.causal = attn_mask_type == AttnMaskType.causal
        self.softmax_scale = softmax_scale
        self.context_group = None
        if config.context_parallel_size > 1:
            assert pg_collection is not None
            self.context_group = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: (T, N, D) when packed, else (S, B, N, D); key and value with G heads for N.
            attention_mask, attn_mask_type, attention_bias: megatron-core's protocol; unused, the
                layer is causal or full by construction.
            packed_seq_params: a `PackedSequence` when packed.

        Returns:
            (T, N*D) when packed, else (S, B, N*D).
        """
        if packed_seq_params is None:
            assert self.context_group is None, "context parallelism needs a described pack"
            query_BNSD, key_BGSD, value_BGSD = (
                tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)
            )
            context_BNSD = attend(
                query_BNSD, key_BGSD, value_BGSD, causal=self.causal, scale=self.softmax_scale
            )
            return context_BNSD.permute(2, 0, 1, 3).flatten(2)
        assert isinstance(packed_seq_params, PackedSequence)
        if self.context_group is not None:
            key, value = gather_keys_and_values(key, value, packed_seq_params, self.context_group)
        context_TND = attend_segments(
            query,
            key,
            value,
            packed_seq_params.boundaries,
            packed_seq_params.segments,
            causal=self.causal,
            scale=self.softmax_scale,
        )
        return context_TND.flatten(1)
