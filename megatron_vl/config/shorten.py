"""A stage made shallow: the same widths, layout and precision, fewer layers.

For `mvl check` and the GPU bench: what a layout or a kernel does to a layer shows on one layer of
each kind. Pure arithmetic on the config.
"""

import copy

from megatron_vl.config.schema import CarryConfig, StageConfig, WeightSource


def shorten(config: StageConfig, *, layers: int = 0, encoder_layers: int = 2) -> StageConfig:
    """The stage with the first layers of its decoder and encoder, starting from drawn weights.

    Args:
        layers: decoder layers to keep; 0 keeps as many as it takes to have each kind of the pattern
            once. Raised to the next multiple of parallel.pipeline; first_stage_layers is undone.
        encoder_layers: encoder layers to keep.

    Raises:
        ValueError: more layers are asked for than there are, or the pipeline has more stages than
            the pattern has layers.
    """
    pattern, pipeline = config.model.decoder.pattern, config.parallel.pipeline
    if layers > len(pattern):
        raise ValueError(f"{layers} layers were asked for, the pattern has {len(pattern)}")
    wanted = layers or max(pattern.index(kind) for kind in set(pattern)) + 1
    kept = -(-wanted // pipeline) * pipeline
    if kept > len(pattern):
        kept = len(pattern) // pipeline * pipeline
    if kept == 0:
        raise ValueError(
            f"parallel.pipeline is {pipeline}, the pattern has {len(pattern)} layers; "
            f"nearest valid: parallel.pipeline {len(pattern)}"
        )
    short = copy.deepcopy(config)
    short.model.decoder.pattern = pattern[:kept]
    short.model.encoder.num_layers = min(encoder_layers, config.model.encoder.num_layers)
    short.parallel.first_stage_layers = 0
    short.carry = CarryConfig(weights=WeightSource.random)
    return short
