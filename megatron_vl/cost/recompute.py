"""Which layers a stage's `recompute` section names, over all pipeline stages together.

What: the decoder layers of each pipeline stage, and those among them (and of the encoder) whose
activations are computed again.
Why: FLOPs, planning and the engine must mean the same layers by the same numbers.
What it refuses: nothing; `config.check` guards the numbers. What it costs: nothing; no torch.
"""

import itertools
from dataclasses import dataclass

from megatron_vl.config.schema import ParallelConfig, RecomputeConfig
from megatron_vl.config.schema_model import LAYER_KINDS, ModelConfig


@dataclass(frozen=True)
class Recomputed:
    """Layers whose activations are computed again.

    Attributes:
        decoder: the pattern's character of each such decoder layer, over all pipeline stages.
        encoder: number of encoder layers.
    """

    decoder: str = ""
    encoder: int = 0


NOTHING = Recomputed()


def pipeline_stages(pattern: str, parallel: ParallelConfig) -> list[str]:
    """The decoder layers of each pipeline stage, as parts of the pattern."""
    ranks = parallel.pipeline
    first = parallel.first_stage_layers or len(pattern) // ranks
    other = (len(pattern) - first) // (ranks - 1) if ranks > 1 else 0
    starts = [0, *(first + other * index for index in range(ranks))]
    return [pattern[start:end] for start, end in itertools.pairwise(starts)]


def recomputed_layers(
    model: ModelConfig, parallel: ParallelConfig, recompute: RecomputeConfig
) -> Recomputed:
    """The layers that a stage's config names."""
    chosen = [
        symbol
        for stage in pipeline_stages(model.decoder.pattern, parallel)
        for symbol in stage[: recompute.decoder]
        if LAYER_KINDS[symbol] in recompute.kinds
    ]
    return Recomputed("".join(chosen), min(recompute.encoder, model.encoder.num_layers))
