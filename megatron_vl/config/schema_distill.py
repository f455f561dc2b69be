"""The schema of a stage's `distill` section; see `schema`."""

from dataclasses import dataclass
from enum import Enum


class StudentFormat(Enum):
    """What the decoder's linears multiply in a distillation stage."""

    none = "none"
    fp8 = "fp8"
    nvfp4 = "nvfp4"


@dataclass
class DistillConfig:
    """Quantization-aware distillation: the stage's model, fake-quantized, learns the distribution
    that its own starting weights give."""

    student: StudentFormat = StudentFormat.none
    """Numbers that the decoder's linears multiply: fp8 or nvfp4 as a release holds them, or none
    where the stage learns from its labels, without a teacher. [choice; engine, train]"""
    temperature: float = 1.0
    """What both models' logits are divided by; the divergence is multiplied by its square. [1;
    train]"""
    calibration_batches: int = 8
    """Global batches, the stage's first, whose largest inputs fix the scales of the activations
    before the first step. [batches; train]"""
