"""The rules of what splits a sequence: sequence parallelism and context parallelism.

Context ranks share every document in 2 * C equal chunks, Mamba's heads among themselves, and its
groups whole or copied. Each function returns messages: what was asked, the rule, the nearest valid
value.
"""

from collections.abc import Iterator

from megatron_vl.config.schema import StageConfig


def check_sequence(config: StageConfig) -> Iterator[str]:
    """Every rule of splits along the sequence that a stage breaks."""
    parallel = config.parallel
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence is true, but parallel.tensor is 1 and there is nobody to share the "
            "sequence with; nearest valid: parallel.sequence false, or parallel.tensor 2"
        )
    if parallel.context > 1:
        yield from _mamba_heads(config)
        yield from _alignment(config)
    yield from _length(config)


def _mamba_heads(config: StageConfig) -> Iterator[str]:
    """Context ranks share the heads of a tensor rank; a group goes to one of them or to several."""
    decoder, parallel = config.model.decoder, config.parallel
    tensor, context = parallel.tensor, parallel.context
    if decoder.mamba_num_heads % tensor or decoder.mamba_num_groups % tensor:
        return  # another rule speaks of parallel.tensor
    heads, groups = decoder.mamba_num_heads // tensor, decoder.mamba_num_groups // tensor
    if fits_mamba(heads, groups, context):
        return
    nearest = min(
        (size for size in range(1, heads + 1) if fits_mamba(heads, groups, size)),
        key=lambda size: abs(size - context),
    )
    yield (
        f"parallel.context is {context}, must divide the {heads} Mamba heads of a tensor rank "
        f"(model.decoder.mamba_num_heads {decoder.mamba_num_heads} over parallel.tensor {tensor}), "
        f"and divide or be a multiple of its {groups} groups; nearest valid: {nearest}"
    )


def fits_mamba(heads: int, groups: int, context: int) -> bool:
    """Whether so many context ranks can share a tensor rank's Mamba heads and groups."""
    return heads % context == 0 and (groups % context == 0 or context % groups == 0)


def _alignment(config: StageConfig) -> Iterator[str]:
    alignment, step = config.data.document_alignment, 2 * config.parallel.context
    if alignment % step:
        nearest = max(1, round(alignment / step)) * step
        yield (
            f"data.document_alignment is {alignment}, must be a multiple of {step} (2 * "
            f"parallel.context {config.parallel.context}), so that context ranks share every "
            f"document evenly; nearest valid: {nearest}"
        )


def _length(config: StageConfig) -> Iterator[str]:
    parallel, length = config.parallel, config.data.sequence_length
    factors = {}
    if parallel.sequence:
        factors[f"parallel.tensor {parallel.tensor} (parallel.sequence is true)"] = parallel.tensor
    if parallel.context > 1:
        factors[f"2 * parallel.context {parallel.context}"] = 2 * parallel.context
    step = 1
    for factor in factors.values():
        step *= factor
    if length % step:
        nearest = max(1, round(length / step)) * step
        yield (
            f"data.sequence_length is {length}, must be a multiple of {step}, that is "
            f"{' times '.join(factors)}; nearest valid: {nearest}"
        )
