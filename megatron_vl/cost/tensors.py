"""Every parameter tensor of one rank, in the order in which the model holds them.

What: name, part and elements of each, for a pipeline stage of a layout.
Why: megatron-core lays gradients and optimizer state out in one buffer, each tensor at an aligned
place; how large it is and whose share holds what depends on every single size.
What it refuses: nothing; `config.check` guards the layout. What it costs: nothing; no torch.

Tensor ranks split matrices, the convolution and what belongs to a head; norms of the residual
stream, biases added after a reduction, the position table and prefix tokens are on each of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.config.schema_model import DecoderConfig, EncoderConfig, ModelConfig
from megatron_vl.cost.parameters import (
    CONVOLUTION_TAPS,
    IMAGE_CHANNELS,
    SHUFFLED_PATCHES,
    mamba_widths,
)
from megatron_vl.cost.recompute import pipeline_stages

Sized = Iterator[tuple[str, int]]


@dataclass(frozen=True)
class ParameterTensor:
    """One parameter of a rank.

    Attributes:
        part: encoder, projector or decoder.
        name: short, inside its part, such as `layers.3.in_proj.weight`; layers count over the whole
            decoder.
        size: elements on this rank.
    """

    part: str
    name: str
    size: int


def rank_tensors(model: ModelConfig, parallel: ParallelConfig, stage: int) -> list[ParameterTensor]:
    """The parameters of each rank of pipeline stage `stage` (0 is the first), in their order."""
    tensor = parallel.tensor
    stages = pipeline_stages(model.decoder.pattern, parallel)
    first, last = stage == 0, stage == len(stages) - 1
    before = sum(map(len, stages[:stage]))
    found: list[ParameterTensor] = []

    def add(part: str, sizes: Sized, prefix: str = "") -> None:
        found.extend(ParameterTensor(part, prefix + name, size) for name, size in sizes)

    table = model.padded_vocab_size * model.decoder.hidden_size // tensor
    if first:
        add("encoder", _encoder(model.encoder, tensor))
        add("projector", _projector(model, tensor))
        add("decoder", iter([("embedding.weight", table)]))
    for index, symbol in enumerate(stages[stage]):
        add("decoder", _LAYERS[symbol](model.decoder, tensor), f"layers.{before + index}.")
    if last:
        ends = [("final_norm.weight", model.decoder.hidden_size), ("output.weight", table)]
        add("decoder", iter(ends))
    return found


def _encoder(encoder: EncoderConfig, tensor: int) -> Sized:
    width, inner = encoder.hidden_size, encoder.ffn_hidden_size
    yield "prefix_tokens", encoder.num_prefix_tokens * width
    yield "position_table", encoder.position_grid**2 * width
    yield "patches.weight", IMAGE_CHANNELS * encoder.patch_size**2 * width // tensor
    for index in range(encoder.num_layers):
        for name, size in (
            ("proj.weight", width * width // tensor),
            ("proj.bias", width),
            ("qkv.weight", 3 * width * width // tensor),
            ("qkv.bias", 3 * width // tensor),
            ("qkv.norm.weight", width),
            ("qkv.norm.bias", width),
            ("fc1.weight", width * inner // tensor),
            ("fc1.bias", inner // tensor),
            ("fc1.norm.weight", width),
            ("fc1.norm.bias", width),
            ("fc2.weight", inner * width // tensor),
            ("fc2.bias", width),
        ):
            yield f"layers.{index}.{name}", size


def _projector(model: ModelConfig, tensor: int) -> Sized:
    width = SHUFFLED_PATCHES * model.encoder.hidden_size
    inner = model.projector.ffn_hidden_size
    yield "fc1.weight", width * inner // tensor
    yield "fc1.norm.weight", width
    yield "fc2.weight", inner * model.decoder.hidden_size // tensor


def _mamba(decoder: DecoderConfig, tensor: int) -> Sized:
    widths, heads = mamba_widths(decoder), decoder.mamba_num_heads // tensor
    yield "dt_bias", heads
    yield "A_log", heads
    yield "D", heads
    yield "in_proj.weight", widths.projected * decoder.hidden_size // tensor
    yield "in_proj.norm.weight", decoder.hidden_size
    yield "conv1d.weight", widths.convolved * CONVOLUTION_TAPS // tensor
    yield "conv1d.bias", widths.convolved // tensor
    yield "norm.weight", widths.inner // tensor
    yield "out_proj.weight", widths.inner * decoder.hidden_size // tensor


def _mlp(decoder: DecoderConfig, tensor: int) -> Sized:
    matrix = decoder.hidden_size * decoder.ffn_hidden_size // tensor
    yield "fc1.weight", matrix
    yield "fc1.norm.weight", decoder.hidden_size
    yield "fc2.weight", matrix


def _attention(decoder: DecoderConfig, tensor: int) -> Sized:
    query = decoder.num_attention_heads * decoder.head_dim
    keys = 2 * decoder.num_query_groups * decoder.head_dim
    yield "proj.weight", query * decoder.hidden_size // tensor
    yield "qkv.weight", (query + keys) * decoder.hidden_size // tensor
    yield "qkv.norm.weight", decoder.hidden_size


_LAYERS = {"M": _mamba, "-": _mlp, "*": _attention}
"""The tensors of a decoder layer by its character of the pattern."""
