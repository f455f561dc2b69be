"""Activation recompute, layer by layer: what a layer kept for its backward pass is computed again.

What: a marked layer keeps its input alone; its forward pass runs a second time inside the backward
pass. Which layers are marked is counted from the first layer of each pipeline stage's decoder and
of the encoder (see `RecomputeConfig`).

Why: megatron-core's MambaStack has no activation recompute, and its TransformerBlock has one that
knows nothing of frozen parts. Whatever a layer records while it runs (an amax) is recorded twice
and must not mind.

What it refuses: dropout (AssertionError), because no random state is kept for the second pass. What
it costs: one more forward pass of each marked layer; nothing where no gradient is asked for (a
frozen encoder, evaluation).

The gradients are bitwise those without recompute: the same operations in the same order.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

from megatron_vl.config.schema import RecomputeConfig
from megatron_vl.config.schema_model import LAYER_KINDS


class Recomputable(nn.Module):
    """A layer that may keep its input alone; mixed in before megatron-core's layer class.

    Attributes:
        recompute: set by `mark_decoder` and `mark_encoder`.
    """

    recompute = False
    config: TransformerConfig

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """As the layer's own, run again in the backward pass if the layer is marked."""
        run = partial(super().forward, **kwargs)
        if not (self.recompute and self._keeps_activations(hidden_states)):
            return run(hidden_states)
        if self.config.fp8:
            return _transformer_engine_checkpoint(run, hidden_states)
        return torch_checkpoint(
            run,
            hidden_states,
            use_reentrant=False,
            preserve_rng_state=False,
        )

    def _keeps_activations(self, hidden_states: Tensor) -> bool:
        """Whether a plain forward pass would keep anything that recompute can spare."""
        if not torch.is_grad_enabled():
            return False
        return hidden_states.requires_grad or any(p.requires_grad for p in self.parameters())


def _transformer_engine_checkpoint(run: Callable[..., Any], hidden_states: Tensor) -> Any:
    """Transformer Engine's checkpoint: it restores FP8 scales and recipe for the second pass."""
    from megatron.core.extensions.transformer_engine import te_checkpoint

    # Its graph hangs on its input alone. Whatever learns in a layer, something before it does too.
    assert hidden_states.requires_grad
    return te_checkpoint(run, False, get_cuda_rng_tracker, None, hidden_states)


class RecomputableMambaLayer(Recomputable, MambaLayer):
    """megatron-core's Mamba layer."""


class RecomputableMLPLayer(Recomputable, MLPLayer):
    """megatron-core's MLP layer."""


class RecomputableTransformerLayer(Recomputable, TransformerLayer):
    """megatron-core's transformer layer: the decoder's attention, the encoder's whole layer."""


def mark_decoder(
    layers: Iterable[nn.Module], symbols: Iterable[str], config: RecomputeConfig
) -> None:
    """Mark the first `config.decoder` layers of this pipeline stage, if of a kind asked for.

    Args:
        layers: decoder layers of this stage, in order.
        symbols: the pattern's character of each.
    """
    for index, (layer, symbol) in enumerate(zip(layers, symbols, strict=True)):
        _mark(layer, index < config.decoder and LAYER_KINDS[symbol] in config.kinds)


def mark_encoder(layers: Iterable[nn.Module], config: RecomputeConfig) -> None:
    """Mark the first `config.encoder` encoder layers."""
    for index, layer in enumerate(layers):
        _mark(layer, index < config.encoder)


def _mark(layer: nn.Module, recompute: bool) -> None:
    assert isinstance(layer, Recomputable), type(layer)
    assert layer.config.hidden_dropout == layer.config.attention_dropout == 0.0
    layer.recompute = recompute
