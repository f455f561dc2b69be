"""What one rank of a layout holds before its first activation, from a stage's config alone.

What: bytes of weights, gradient buffers, optimizer state, FP8 copies and a distillation's teacher
of a rank, by pipeline stage and place among the ranks that share the optimizer state.
Why: planning and preflight tell a layout that cannot fit from one that can, without a device.
What it refuses: nothing; `config.check` guards the layout. What it costs: nothing; no torch.

What learns lies in megatron-core's buffers: tensors in reverse order, each at a multiple of 64
elements, the whole padded to a multiple of 128 and of the ranks that share it. Its weights have a
buffer of their own, its gradients one in float32 whatever the precision. Adam's moments are
float32, and in bfloat16 so is the copy of the weights that it steps; of all three a rank holds what
lies in its equal share of the buffer. Not counted: step counters, a few bytes a tensor.

FP8 copies are those Transformer Engine keeps of a weight between micro-batches: along both axes,
with the scales of 128 x 128 blocks. The torch kernels make theirs anew and keep none.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

from megatron_vl.config.check_fp8 import bf16_layers
from megatron_vl.config.schema import Precision, StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.cost.tensors import ParameterTensor, rank_tensors

GRADIENT_BYTES = 4
MOMENT_BYTES = 8
"""Both moments of Adam."""
_TENSOR_ALIGNMENT, _BUFFER_ALIGNMENT = 64, 128
"""Elements; megatron-core's `param_and_grad_buffer`."""
_BLOCK = 128 * 128
"""Elements that share a scale in blockwise FP8."""


@dataclass(frozen=True)
class RankBytes:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int = 0
    teacher: int = 0

    @property
    def total(self) -> int:
        """Of all of them."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class Buffer:
    """A rank's learning tensors as they lie in one buffer.

    Attributes:
        places: first element and size of each tensor.
        size: elements of the buffer, padding included.
        shards: ranks that share its optimizer state.
    """

    places: tuple[tuple[int, int], ...]
    size: int
    shards: int

    def held(self, shard: int) -> int:
        """Elements of tensors in one share."""
        width = self.size // self.shards
        start, end = shard * width, (shard + 1) * width
        return sum(max(0, min(end, a + size) - max(start, a)) for a, size in self.places)

    def largest_shard(self) -> int:
        """The share that holds most; the first of several."""
        return max(range(self.shards), key=lambda shard: (self.held(shard), -shard))


def bytes_of(precision: Precision) -> int:
    """Bytes of one weight or activation."""
    return 4 if precision is Precision.fp32 else 2


def rank_bytes(config: StageConfig, stage: int, shard: int | None = None) -> RankBytes:
    """What a rank of a pipeline stage holds.

    Args:
        stage: 0 is the first.
        shard: its place among the data and context ranks that share the optimizer state; None for
            the one that holds most.
    """
    tensors = rank_tensors(config.model, config.parallel, stage)
    learns = {part.value for part in config.train.trainable}
    buffer = gradient_buffer(
        [tensor for tensor in tensors if tensor.part in learns],
        config.parallel.data * config.parallel.context,
    )
    frozen = sum(tensor.size for tensor in tensors if tensor.part not in learns)
    width = bytes_of(config.precision)
    state = MOMENT_BYTES + (0 if config.precision is Precision.fp32 else 4)
    held = buffer.held(buffer.largest_shard() if shard is None else shard)
    return RankBytes(
        weights=width * (buffer.size + frozen),
        gradients=GRADIENT_BYTES * buffer.size,
        optimizer=state * held,
        fp8_copies=_fp8_copies(config, tensors),
        teacher=_teacher_bytes(config, tensors),
    )


def gradient_buffer(tensors: Sequence[ParameterTensor], shards: int) -> Buffer:
    """Lay learning tensors out as megatron-core's distributed optimizer does."""
    places, end = [], 0
    for tensor in reversed(tensors):
        start = -(-end // _TENSOR_ALIGNMENT) * _TENSOR_ALIGNMENT
        places.append((start, tensor.size))
        end = start + tensor.size
    step = math.lcm(shards, _BUFFER_ALIGNMENT)
    return Buffer(tuple(places), -(-end // step) * step, shards)


def _teacher_bytes(config: StageConfig, tensors: Sequence[ParameterTensor]) -> int:
    """The weights of a distillation's teacher, a whole second model."""
    if config.distill.student is StudentFormat.none:
        return 0
    return bytes_of(config.precision) * sum(tensor.size for tensor in tensors)


def _fp8_copies(config: StageConfig, tensors: Sequence[ParameterTensor]) -> int:
    """Of every matrix that is multiplied in FP8; along one axis where nothing is passed back."""
    if not config.precision.is_fp8:
        return 0
    kept, learns = bf16_layers(config), {part.value for part in config.train.trainable}
    total = 0
    for tensor in tensors:
        words = tensor.name.split(".")
        layered = words[0] == "layers"
        matrix = words[-1] == "weight" and words[-2] in _MATRICES
        layer = f"{tensor.part}.{words[1]}" if layered else tensor.part
        if not matrix or layer in kept:
            continue
        axes = 1 if tensor.part == "encoder" and "encoder" not in learns else 2
        scales = -(-tensor.size // _BLOCK) * 4 if config.precision is Precision.fp8_blockwise else 4
        total += axes * (tensor.size + scales)
    return total


_MATRICES = ("in_proj", "out_proj", "qkv", "proj", "fc1", "fc2")
"""Names of the matrices that run in FP8 in layers and projector."""
