"""FLOPs of one pack: what its matrix products cost, whatever kernel runs them.

What: forward and backward FLOPs of encoder, projector and decoder for one packed sequence (model
FLOPs, which utilisation is measured by), and apart from them what runs beyond: layers computed
again, and products whose result nobody reads.
Why: throughput, model and hardware FLOP utilisation and the cost of packs are derived from it.
What it refuses (ValueError): documents longer than the pack, unknown parts, grids without patches.
What it costs: nothing; it imports no torch.

The rules, in FLOPs (a multiply-add is 2):
- a matrix of P parameters applied to T tokens: 2 P T forward; as much again for the gradient of its
  input where something before it learns; as much again for its own gradient where it learns.
- causal attention of width W over documents of l tokens: 2 W sum(l^2), half the squares of QK^T
  and PV; twice that backward. Encoder attention sees all of its picture: 4 W S^2 a layer.
- the scan, a token of H heads (P, N), G groups, chunk length Q: Q (G N + H P) inside the chunk (the
  causal half) and 4 H P N through the state; its convolution 2 taps a channel; twice backward.
- norms, activations, position tables, embedding look-ups and the loss count nothing.

Beyond the model (`repeated`), wherever there is a backward pass:
- the forward FLOPs of every layer whose activations are recomputed, and of the output matrix, whose
  logits are never kept;
- inside the scan's backward pass Q G N and 2 H P N a token: scores and states' outputs once more;
- gradients of inputs before which nothing learns: megatron-core computes them for every matrix that
  learns (the patch embedding; the projector's first matrix behind a frozen encoder).

A pack's matrices run over `padded_length` tokens. Pass the sum of the documents there to leave
padding out, as a measure of useful work.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_vl.config.schema import Part
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
)
from megatron_vl.cost.recompute import NOTHING, Recomputed

Grid = tuple[int, int]
"""Rows and columns of patches of one tile, video frame or whole image."""


@dataclass(frozen=True)
class PackFlops:
    """FLOPs of one pack.

    Attributes:
        forward, backward: what the model asks for.
        repeated: what runs beyond that.
    """

    forward: int = 0
    backward: int = 0
    repeated: int = 0

    @property
    def total(self) -> int:
        """Model FLOPs: forward and backward together."""
        return self.forward + self.backward

    @property
    def hardware(self) -> int:
        """Everything that runs."""
        return self.total + self.repeated

    def __add__(self, other: "PackFlops") -> "PackFlops":
        return PackFlops(
            self.forward + other.forward,
            self.backward + other.backward,
            self.repeated + other.repeated,
        )


@dataclass(frozen=True)
class _Work:
    """Forward FLOPs of one kind of product in one layer, and who asks for gradients of it.

    Attributes:
        weights: products with weights.
        activations: products of activations with each other.
        learns: its weights learn.
        passes_on: something before it learns.
        layers, again: layers that have it, and those among them that are recomputed.
        inside: done once more inside the backward pass of the product itself, a layer.
    """

    weights: int
    activations: int
    learns: bool
    passes_on: bool
    layers: int = 1
    again: int = 0
    inside: int = 0

    def flops(self) -> PackFlops:
        """Of all its layers."""
        backward = self.weights * (self.learns + self.passes_on)
        backward += 2 * self.activations * self.passes_on
        repeated = 0
        if self.learns or self.passes_on:
            repeated = self.again * (self.weights + self.activations) + self.layers * self.inside
        if self.learns and not self.passes_on:
            repeated += self.layers * self.weights
        forward = self.weights + self.activations
        return PackFlops(self.layers * forward, self.layers * backward, repeated)


def pack_flops(
    model: ModelConfig,
    *,
    document_lengths: Sequence[int],
    padded_length: int,
    grids: Sequence[Grid],
    trainable: set[str],
    recomputed: Recomputed = NOTHING,
) -> PackFlops:
    """FLOPs of one packed sequence with its pictures.

    Args:
        model: the model section of a stage.
        document_lengths: tokens of each document; attention does not cross them.
        padded_length: tokens the pack is computed over, padding included.
        grids: patches of every tile, video frame and whole image, before any video pruning.
        trainable: parts that learn: any of encoder, projector, decoder.
        recomputed: layers whose activations are computed again.

    Returns:
        FLOPs forward and backward. Parts that learn nothing and have nothing learning before them
        cost no backward; frozen parts behind a learning one cost activation gradients only.

    Raises:
        ValueError: the documents do not fit the pack, a part is unknown, or a grid is empty.
    """
    kinds = flops_by_kind(
        model,
        document_lengths=document_lengths,
        padded_length=padded_length,
        grids=grids,
        trainable=trainable,
        recomputed=recomputed,
    )
    return sum(kinds.values(), PackFlops())


def flops_by_kind(
    model: ModelConfig,
    *,
    document_lengths: Sequence[int],
    padded_length: int,
    grids: Sequence[Grid],
    trainable: set[str],
    recomputed: Recomputed = NOTHING,
) -> dict[str, PackFlops]:
    """`pack_flops` by kind of product: patches, encoder, encoder_attention, projector, mamba,
    convolution, scan_inside, scan_state, mlp, attention_matrices, attention, head."""
    unknown = sorted(set(trainable) - {part.value for part in Part})
    if unknown:
        raise ValueError(f"unknown parts {unknown}; parts are encoder, projector, decoder")
    if min(document_lengths, default=0) < 0 or sum(document_lengths) > padded_length:
        raise ValueError(
            f"documents of {list(document_lengths)} tokens do not fit a pack of {padded_length}"
        )
    if any(rows < 1 or columns < 1 for rows, columns in grids):
        raise ValueError(f"grids {list(grids)}: each needs at least one row and column of patches")
    encoder_learns = "encoder" in trainable and bool(grids)
    projector_learns = "projector" in trainable and bool(grids)
    visual = _visual(model, grids, encoder_learns, projector_learns, recomputed.encoder)
    before = encoder_learns or projector_learns
    learns = "decoder" in trainable
    decoder = _decoder(model, document_lengths, padded_length, learns, before, recomputed)
    kinds: dict[str, PackFlops] = {}
    for name, work in (*visual, *decoder):
        kinds[name] = kinds.get(name, PackFlops()) + work.flops()
    return kinds


Works = Iterator[tuple[str, _Work]]


def _visual(
    model: ModelConfig,
    grids: Iterable[Grid],
    encoder_learns: bool,
    projector_learns: bool,
    again: int,
) -> Works:
    encoder, projector = model.encoder, model.projector
    patches = [rows * columns for rows, columns in grids]
    pixels = IMAGE_CHANNELS * encoder.patch_size**2
    embedding = 2 * pixels * encoder.hidden_size * sum(patches)
    yield "patches", _Work(embedding, 0, encoder_learns, False)

    tokens = [count + encoder.num_prefix_tokens for count in patches]
    matrices = 2 * encoder_matrices(encoder) * sum(tokens)
    attention = 4 * encoder.hidden_size * sum(count**2 for count in tokens)
    layers = (encoder_learns, encoder_learns, encoder.num_layers, again)
    yield "encoder", _Work(matrices, 0, *layers)
    yield "encoder_attention", _Work(0, attention, *layers)

    # Odd edges are padded to whole blocks of 2 x 2 patches.
    embeddings = sum(-(-rows // 2) * -(-columns // 2) for rows, columns in grids)
    wide, narrow = SHUFFLED_PATCHES * encoder.hidden_size, model.decoder.hidden_size
    first, second = (2 * width * projector.ffn_hidden_size * embeddings for width in (wide, narrow))
    yield "projector", _Work(first, 0, projector_learns, encoder_learns)
    yield "projector", _Work(second, 0, projector_learns, projector_learns or encoder_learns)


def _decoder(
    model: ModelConfig,
    document_lengths: Sequence[int],
    tokens: int,
    learns: bool,
    before: bool,
    recomputed: Recomputed,
) -> Works:
    decoder = model.decoder
    gradients = (learns, learns or before)
    mamba, mlp, attention = (
        (*gradients, decoder.pattern.count(sign), recomputed.decoder.count(sign)) for sign in "M-*"
    )
    widths, state = mamba_widths(decoder), decoder.mamba_state_dim
    chunk = min(decoder.mamba_chunk_size, tokens)
    yield "mamba", _Work(2 * mamba_matrices(decoder) * tokens, 0, *mamba)
    # Taps are weights: they have a gradient of their own and hand one on, like a matrix.
    yield "convolution", _Work(2 * CONVOLUTION_TAPS * widths.convolved * tokens, 0, *mamba)
    scores = chunk * decoder.mamba_num_groups * state * tokens
    inside = scores + chunk * widths.inner * tokens
    yield "scan_inside", _Work(0, inside, *mamba, inside=scores)
    through = 2 * widths.inner * state * tokens
    yield "scan_state", _Work(0, 2 * through, *mamba, inside=through)

    yield "mlp", _Work(2 * mlp_matrices(decoder) * tokens, 0, *mlp)

    yield "attention_matrices", _Work(2 * attention_matrices(decoder) * tokens, 0, *attention)
    squares = sum(length * length for length in document_lengths)
    attended = 2 * decoder.num_attention_heads * decoder.head_dim * squares
    yield "attention", _Work(0, attended, *attention)

    head = 2 * model.padded_vocab_size * decoder.hidden_size * tokens
    yield "head", _Work(head, 0, *gradients, again=1)
