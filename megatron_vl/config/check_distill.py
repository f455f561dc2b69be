"""The rules of a distillation stage."""

from collections.abc import Iterator

from megatron_vl.config.schema import Part, StageConfig, WeightSource
from megatron_vl.config.schema_distill import StudentFormat

BLOCK = 16
"""Columns of a weight that share an NVFP4 scale."""


def distill_ranges(config: StageConfig) -> dict[str, tuple[float, float]]:
    """Values with their lower bounds."""
    return {"distill.calibration_batches": (config.distill.calibration_batches, 1)}


def check_distill(config: StageConfig) -> Iterator[str]:
    """Every rule of distillation that the stage breaks."""
    if config.distill.student is StudentFormat.none:
        return
    if not config.distill.temperature > 0:
        yield (
            f"distill.temperature is {config.distill.temperature}, must be above 0; nearest valid: "
            "1.0"
        )
    if config.precision.is_fp8:
        yield (
            f"distill.student is {config.distill.student.name}, but precision "
            f"{config.precision.name} already quantizes what its linears multiply; nearest valid: "
            "precision bf16"
        )
    if config.carry.weights is not WeightSource.previous:
        yield (
            "distill.student needs a teacher, which is the stage's starting weights, but "
            "carry.weights is random; nearest valid: carry.weights previous"
        )
    if config.carry.fresh:
        drawn = ", ".join(part.name for part in config.carry.fresh)
        yield (
            f"distill.student needs a teacher, which is the stage's starting weights, but "
            f"carry.fresh draws {drawn} anew; nearest valid: carry.fresh []"
        )
    if Part.decoder not in config.train.trainable:
        yield (
            "distill.student quantizes the decoder, but train.trainable leaves it frozen; nearest "
            "valid: train.trainable with decoder"
        )
    if config.distill.student is StudentFormat.nvfp4:
        yield from _widths(config)


def _widths(config: StageConfig) -> Iterator[str]:
    """A block of columns that share a scale must lie within one tensor rank."""
    decoder, tensor = config.model.decoder, config.parallel.tensor
    scanned = decoder.mamba_num_heads * decoder.mamba_head_dim
    attended = decoder.num_attention_heads * decoder.head_dim
    inner = {
        "-": ("ffn_hidden_size", decoder.ffn_hidden_size),
        "M": ("mamba_num_heads times mamba_head_dim", scanned),
        "*": ("num_attention_heads times head_dim", attended),
    }
    split = [found for kind, found in inner.items() if kind in decoder.pattern]
    for ranks, (key, width) in [(1, ("hidden_size", decoder.hidden_size))] + [
        (tensor, found) for found in split
    ]:
        step = BLOCK * ranks
        if width % step:
            shared = f" times parallel.tensor {tensor}" if ranks > 1 else ""
            nearest = max(1, round(width / step)) * step
            yield (
                f"model.decoder.{key} is {width}, must be a multiple of {BLOCK}{shared}, the "
                f"numbers that share an NVFP4 scale; nearest valid: {nearest}"
            )
