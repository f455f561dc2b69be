"""What one rank of a layout must hold before its first activation, from a stage's config alone.

What: bytes of weights, gradient buffers and optimizer state of a rank, by pipeline stage.
Why: planning and preflight tell a layout that cannot fit from one that can, without a device.
What it refuses: nothing; `config.check` guards the layout. What it costs: nothing; no torch.

Tensor ranks split matrices, the convolution and what belongs to a head; norms of the residual
stream, biases added after a reduction, the position table and prefix tokens are on each of them.
Gradients are float32 whatever the precision, of what learns alone. Adam's moments are float32,
and in bfloat16 so is the copy of the weights that it steps; all three are shared out over data and
context ranks. Not counted: the padding of gradient buffers (below 0.1 %), activations, FP8 copies.
"""

from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig, Precision, StageConfig
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.parameters import (
    CONVOLUTION_TAPS,
    IMAGE_CHANNELS,
    SHUFFLED_PATCHES,
    attention_matrices,
    encoder_matrices,
    mamba_matrices,
    mamba_widths,
    mlp_matrices,
    projector_matrices,
)
from megatron_vl.cost.recompute import pipeline_stages

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
"""Both moments of Adam."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """Of all three."""
        return self.weights + self.gradients + self.optimizer


def rank_bytes(config: StageConfig, stage: int) -> RankBytes:
    """What each rank of a pipeline stage holds.

    Args:
        stage: 0 is the first.
    """
    parts = rank_parameters(config.model, config.parallel, stage)
    learning = sum(parts[part.value] for part in config.train.trainable)
    exact = config.precision is Precision.fp32
    width, copy = (4, 0) if exact else (2, 4)
    shards = config.parallel.data * config.parallel.context
    return RankBytes(
        weights=width * sum(parts.values()),
        gradients=GRADIENT_BYTES * learning,
        optimizer=-(-(MOMENT_BYTES + copy) * learning // shards),
    )


def rank_parameters(model: ModelConfig, parallel: ParallelConfig, stage: int) -> dict[str, int]:
    """Parameters of each part (encoder, projector, decoder) on a rank of a pipeline stage."""
    tensor = parallel.tensor
    first, last = stage == 0, stage == parallel.pipeline - 1
    layers = pipeline_stages(model.decoder.pattern, parallel)[stage]
    decoder = _decoder_layers(model, layers, tensor)
    table = model.padded_vocab_size * model.decoder.hidden_size // tensor
    decoder += first * table + last * (table + model.decoder.hidden_size)
    shuffled = SHUFFLED_PATCHES * model.encoder.hidden_size
    return {
        "encoder": first * _encoder(model, tensor),
        "projector": first * (projector_matrices(model) // tensor + shuffled),
        "decoder": decoder,
    }


def _decoder_layers(model: ModelConfig, layers: str, tensor: int) -> int:
    decoder, widths = model.decoder, mamba_widths(model.decoder)
    convolution = widths.convolved * (CONVOLUTION_TAPS + 1)
    heads = 3 * decoder.mamba_num_heads + widths.inner  # A, D and dt; the norm behind the scan
    split = {
        "M": mamba_matrices(decoder) + convolution + heads,
        "-": mlp_matrices(decoder),
        "*": attention_matrices(decoder),
    }
    return sum(split[symbol] // tensor + decoder.hidden_size for symbol in layers)


def _encoder(model: ModelConfig, tensor: int) -> int:
    encoder, width = model.encoder, model.encoder.hidden_size
    split = encoder_matrices(encoder) + 3 * width + encoder.ffn_hidden_size
    whole = 2 * width + 2 * 2 * width  # biases behind the two row-parallel matrices; two norms
    patches = IMAGE_CHANNELS * encoder.patch_size**2 * width // tensor
    tables = (encoder.position_grid**2 + encoder.num_prefix_tokens) * width
    return encoder.num_layers * (split // tensor + whole) + patches + tables
