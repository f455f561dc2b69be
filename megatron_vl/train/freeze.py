"""Which parameters learn in a stage."""

from collections import Counter

from megatron_vl.config.schema import Part
from megatron_vl.model.vlm import VisionLanguageModel, part_of


def set_trainable(module: VisionLanguageModel, parts: frozenset[Part]) -> Counter[Part]:
    """Let the parameters of `parts` learn and freeze the others, before gradients are allocated.

    Returns:
        Trainable parameters of each part on this rank.
    """
    counts: Counter[Part] = Counter()
    for name, parameter in module.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in parts)
        if part in parts:
            counts[part] += parameter.numel()
    return counts
