"""The rules of FP8, and which layers it leaves in BF16.

Layers are named as the drift meter prints them: `decoder.5` and `encoder.0`, numbered from 0 over
the whole stack whatever the pipeline split, and `projector`.
"""

from collections.abc import Iterator

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import Tiling

TOKEN_MULTIPLE = 16
"""FP8 products need a multiple of this many rows and columns; others are filled up, at a cost."""


def layers_of(config: StageConfig) -> list[str]:
    """Every layer whose linears may run in FP8, by name."""
    decoder = [f"decoder.{index}" for index in range(len(config.model.decoder.pattern))]
    encoder = [f"encoder.{index}" for index in range(config.model.encoder.num_layers)]
    return [*decoder, *encoder, "projector"]


def bf16_layers(config: StageConfig) -> frozenset[str]:
    """The layers that an FP8 stage leaves in BF16: both ends of either stack, and those named."""
    first, last = config.fp8.first_layers_bf16, config.fp8.last_layers_bf16
    ends = []
    for stack in ("decoder", "encoder"):
        names = [name for name in layers_of(config) if name.startswith(stack)]
        ends += names[:first] + names[max(0, len(names) - last) :]
    return frozenset(ends + config.fp8.keep_bf16)


def fp8_ranges(config: StageConfig) -> dict[str, tuple[float, float]]:
    """Values with their lower bounds."""
    fp8 = config.fp8
    return {
        "fp8.first_layers_bf16": (fp8.first_layers_bf16, 0),
        "fp8.last_layers_bf16": (fp8.last_layers_bf16, 0),
        "fp8.amax_history": (fp8.amax_history, 1),
        "fp8.drift_every": (fp8.drift_every, 0),
    }


def check_fp8(config: StageConfig) -> Iterator[str]:
    """Every rule of FP8 that the stage breaks."""
    yield from _names(config)
    if config.precision.is_fp8:
        yield from _sizes(config)
        layers = len(config.model.decoder.pattern)
        first, last = config.fp8.first_layers_bf16, config.fp8.last_layers_bf16
        if first + last >= layers:
            yield (
                f"fp8.first_layers_bf16 {first} and fp8.last_layers_bf16 {last} leave none of the "
                f"{layers} decoder layers for FP8; nearest valid: a sum of {layers - 1}, or "
                "precision bf16"
            )


def _names(config: StageConfig) -> Iterator[str]:
    known = layers_of(config)
    for name in config.fp8.keep_bf16:
        if name not in known:
            yield (
                f"fp8.keep_bf16 names {name!r}, which is no layer of this model; nearest valid: "
                f"{_nearest_layer(name, known)}"
            )


def _nearest_layer(name: str, known: list[str]) -> str:
    """The last layer of the stack that was meant; of no stack the first layer there is."""
    stack = name.partition(".")[0]
    return next((layer for layer in reversed(known) if layer.startswith(stack)), known[0])


def _sizes(config: StageConfig) -> Iterator[str]:
    """Tokens of one product, as a context rank sees them, before they are split for norms."""
    length, step = config.data.sequence_length, TOKEN_MULTIPLE * config.parallel.context
    if length % step:
        shared = f" times parallel.context {config.parallel.context}" if step > 16 else ""
        nearest = max(1, round(length / step)) * step
        yield (
            f"data.sequence_length is {length}, must be a multiple of {TOKEN_MULTIPLE}{shared} in "
            f"FP8; nearest valid: {nearest}"
        )
    if config.data.tiling in (Tiling.native, Tiling.native_matched):
        return  # grids differ from image to image; their products are filled up
    encoder = config.model.encoder
    patches = (config.data.tile_size // encoder.patch_size) ** 2
    tokens = patches + encoder.num_prefix_tokens
    if tokens % TOKEN_MULTIPLE:
        more = encoder.num_prefix_tokens + -tokens % TOKEN_MULTIPLE
        fewer = more - TOKEN_MULTIPLE
        asked = encoder.num_prefix_tokens
        nearest = fewer if fewer >= 0 and asked - fewer < more - asked else more
        yield (
            f"a tile is {tokens} encoder tokens ({patches} patches and model.encoder."
            f"num_prefix_tokens {asked}), must be a multiple of {TOKEN_MULTIPLE} in FP8; nearest "
            f"valid: num_prefix_tokens {nearest}"
        )
