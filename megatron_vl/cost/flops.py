"""Model FLOPs of one pack: what its matrix products cost, whatever kernel runs them.

What: forward and backward FLOPs of encoder, projector and decoder for one packed sequence.
Why: throughput, model FLOP utilisation and the cost of packs are all derived from it.
What it refuses (ValueError): documents longer than the pack, unknown parts, tiles that patches do
not fill. What it costs: nothing; it imports no torch.

The rules, in FLOPs (a multiply-add is 2):
- a matrix of P parameters applied to T tokens: 2 P T forward; as much again for the gradient of its
  input where something before it learns; as much again for its own gradient where it learns.
- causal attention of width W over documents of l tokens: 2 W sum(l^2), half the squares of QK^T
  and PV; twice that backward. Encoder attention sees all of its tile: 4 W S^2 a layer.
- the scan, a token of H heads (P, N), G groups, chunk length Q: Q (G N + H P) inside the chunk (the
  causal half) and 4 H P N through the state; its convolution 2 taps a channel; twice backward,
  the convolution's own gradient aside.
- recomputation, norms, activations, position tables, embedding look-ups and the loss count nothing.

A pack's matrices run over `padded_length` tokens. Pass the sum of the documents there to leave
padding out, as a measure of useful work.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_vl.config.schema import ModelConfig, Part
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


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of one pack, forward and backward."""

    forward: int
    backward: int

    @property
    def total(self) -> int:
        """Forward and backward together."""
        return self.forward + self.backward

    def __add__(self, other: "PackFlops") -> "PackFlops":
        return PackFlops(self.forward + other.forward, self.backward + other.backward)


@dataclass(frozen=True)
class _Work:
    """Forward FLOPs of a part: products with weights, and products of activations."""

    weights: int
    activations: int

    def flops(self, learns: bool, passes_on: bool) -> PackFlops:
        """With its weights' gradients if it learns, its inputs' if those are needed."""
        backward = self.weights * (learns + passes_on) + 2 * self.activations * passes_on
        return PackFlops(self.weights + self.activations, backward)


def pack_flops(
    model: ModelConfig,
    *,
    document_lengths: Sequence[int],
    padded_length: int,
    num_tiles: int,
    tile_size: int,
    trainable: set[str],
) -> PackFlops:
    """FLOPs of one packed sequence with its images.

    Args:
        model: the model section of a stage.
        document_lengths: tokens of each document; attention does not cross them.
        padded_length: tokens the pack is computed over, padding included.
        num_tiles: image tiles and video frames of the pack.
        tile_size: edge of a tile in pixels.
        trainable: parts that learn: any of encoder, projector, decoder.

    Returns:
        FLOPs forward and backward. Parts that learn nothing and have nothing learning before them
        cost no backward; frozen parts behind a learning one cost activation gradients only.

    Raises:
        ValueError: the documents do not fit the pack, a part is unknown, a count is negative, or
            the tile is not a multiple of two patches.
    """
    unknown = sorted(set(trainable) - {part.value for part in Part})
    if unknown:
        raise ValueError(f"unknown parts {unknown}; parts are encoder, projector, decoder")
    if min(document_lengths, default=0) < 0 or sum(document_lengths) > padded_length:
        raise ValueError(
            f"documents of {list(document_lengths)} tokens do not fit a pack of {padded_length}"
        )
    if num_tiles < 0:
        raise ValueError(f"{num_tiles} tiles: a count is not negative")
    patch = model.encoder.patch_size
    if tile_size <= 0 or tile_size % (2 * patch):
        raise ValueError(f"a tile of {tile_size} pixels is not a multiple of 2 patches of {patch}")
    patches = num_tiles * (tile_size // patch) ** 2
    encoder_learns = "encoder" in trainable and num_tiles > 0
    projector_learns = "projector" in trainable and num_tiles > 0
    decoder_learns = "decoder" in trainable
    before_decoder = encoder_learns or projector_learns
    return (
        _patch_embedding(model, patches).flops(encoder_learns, False)
        + _encoder_layers(model, num_tiles, patches).flops(encoder_learns, encoder_learns)
        + _projector(model, patches).flops(projector_learns, before_decoder)
        + _decoder(model, document_lengths, padded_length).flops(
            decoder_learns, decoder_learns or before_decoder
        )
    )


def _patch_embedding(model: ModelConfig, patches: int) -> _Work:
    pixels = IMAGE_CHANNELS * model.encoder.patch_size**2
    return _Work(2 * pixels * model.encoder.hidden_size * patches, 0)


def _encoder_layers(model: ModelConfig, num_tiles: int, patches: int) -> _Work:
    encoder = model.encoder
    if num_tiles == 0:
        return _Work(0, 0)
    tokens = patches // num_tiles + encoder.num_prefix_tokens
    matrices = 2 * encoder_matrices(encoder) * tokens
    attention = 4 * encoder.hidden_size * tokens**2
    return _Work(
        encoder.num_layers * num_tiles * matrices, encoder.num_layers * num_tiles * attention
    )


def _projector(model: ModelConfig, patches: int) -> _Work:
    return _Work(2 * projector_matrices(model) * (patches // SHUFFLED_PATCHES), 0)


def _decoder(model: ModelConfig, document_lengths: Sequence[int], padded_length: int) -> _Work:
    decoder = model.decoder
    mamba, mlp, attention = (decoder.pattern.count(sign) for sign in "M-*")
    widths = mamba_widths(decoder)
    # Taps are weights: they have a gradient of their own and hand one on, like a matrix.
    per_token = mamba * (mamba_matrices(decoder) + CONVOLUTION_TAPS * widths.convolved)
    per_token += mlp * mlp_matrices(decoder) + attention * attention_matrices(decoder)
    per_token += model.padded_vocab_size * decoder.hidden_size
    state = decoder.mamba_state_dim
    chunk = min(decoder.mamba_chunk_size, padded_length)
    scan = chunk * (decoder.mamba_num_groups * state + widths.inner) + 4 * widths.inner * state
    squares = sum(length * length for length in document_lengths)
    attended = 2 * decoder.num_attention_heads * decoder.head_dim * squares
    return _Work(2 * per_token * padded_length, mamba * scan * padded_length + attention * attended)
