"""Fake-quantized linears: the decoder multiplies the numbers that a quantized release will hold.

What: `FakeQuantized` gives every linear of a built decoder an operation on its operands. Weights
become the values that an export of them decodes to; inputs are quantized by their calibrated amax.
Parameters, names and checkpoints stay as they are. Only forward products change: gradients go
straight through (`kernels.straight_through`) and are multiplied in the stage's own precision.

Weights change once a step, so `refresh` quantizes them once a step, not once a micro-batch. The
amax of a weight is taken over tensor ranks, as its scale is that of the whole matrix; a block of 16
lies within one rank (`config.check_distill` refuses splits where it would not), so that any layout
holds the same values. Query, key and value share a scale in NVFP4 and have one each in FP8, as
releases do.

What it refuses: see `engine.input_amax`. What it costs: a second copy of the decoder's linears in
the stage's type, one small reduction a step, a byte an input value kept for the backward pass.

Source: NVIDIA's Model Optimizer, whose quantization-aware training quantizes the same operands.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.engine.fp8_state import Place
from megatron_vl.engine.input_amax import InputAmax, decoder_linears, largest_magnitude
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.kernels.nvfp4 import fake_nvfp4
from megatron_vl.kernels.static_fp8 import fake_fp8
from megatron_vl.kernels.straight_through import Fake, stand_in, straight_through

PREFIX = "fake_quant."
_FAKES: Mapping[StudentFormat, Fake] = {
    StudentFormat.fp8: fake_fp8,
    StudentFormat.nvfp4: fake_nvfp4,
}
_QKV = "self_attention.linear_qkv"
AMAX_PREFIX, SEEN = f"{PREFIX}input_amax.", f"{PREFIX}seen"


class FakeQuantized:
    """The linears of a rank's decoder layers, once they are quantized.

    Args:
        module: this rank's pipeline stage, on the torch spec's linears.
        student: the format of its numbers.

    Attributes:
        input_amax: largest input of each of this rank's linears; empty until `quantize`.
        seen: packs and tokens that they come from.
    """

    def __init__(
        self, module: nn.Module, groups: ProcessGroupCollection, student: StudentFormat
    ) -> None:
        self.linears = decoder_linears(module)
        self._student, self._fake = student, _FAKES[student]
        self.input_amax: dict[Place, float] = {}
        self.seen = (0, 0)
        self._groups = groups
        self._values: list[Tensor] = []

    def recorder(self) -> InputAmax:
        """A recorder of these linears' inputs."""
        return InputAmax(self.linears)

    def quantize(self, input_amax: Mapping[Place, float], seen: tuple[int, int]) -> None:
        """Switch fake quantization on.

        Args:
            input_amax: the largest input of each linear.
            seen: packs and tokens that they come from.
        """
        self.input_amax, self.seen = dict(input_amax), seen
        self._values = [torch.empty_like(linear.weight) for linear in self.linears.values()]
        for (place, linear), values in zip(self.linears.items(), self._values, strict=True):
            amax = torch.tensor(input_amax[place], dtype=torch.float32, device=PLATFORM.device)
            linear.operands = partial(_operands, self._fake, amax, values)
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Quantize the weights as they are now; call whenever they have changed."""
        # A release holds bfloat16 weights, and quantizes those.
        weights = [linear.weight.bfloat16() for linear in self.linears.values()]
        parts, values = self._parts(weights), self._parts(self._values)
        amax_I = torch.stack([largest_magnitude(part) for part in parts])
        torch.distributed.all_reduce(amax_I, torch.distributed.ReduceOp.MAX, group=self._groups.tp)
        for part, amax, value in zip(parts, amax_I, values, strict=True):
            value.copy_(self._fake(part, amax, value.dtype))

    def _parts(self, weights: Sequence[Tensor]) -> list[Tensor]:
        """Views of the linears' weights, each of all the rows that share a scale."""
        if self._student is StudentFormat.nvfp4:
            return list(weights)
        found: list[Tensor] = []
        for (place, linear), weight in zip(self.linears.items(), weights, strict=True):
            found += _query_key_value(linear, weight) if place.linear == _QKV else [weight]
        return found

    def sharded(self) -> dict[str, ShardedTensor]:
        """The calibration as a checkpoint stores it: a number a linear, at any layout."""
        groups = self._groups
        replica = (0, groups.tp.rank(), groups.dp_cp.rank())
        seen = ShardedTensor.from_rank_offsets(
            SEEN,
            torch.tensor(self.seen, device=PLATFORM.device),
            replica_id=(groups.pp.rank(), *replica[1:]),
        )
        return {SEEN: seen} | {
            f"{AMAX_PREFIX}{place}": ShardedTensor.from_rank_offsets(
                f"{AMAX_PREFIX}{place}",
                torch.tensor([self.input_amax.get(place, 0.0)], device=PLATFORM.device),
                replica_id=replica,
            )
            for place in self.linears
        }

    def restore(self, loaded: Mapping[str, Tensor]) -> None:
        """`quantize` by what `sharded` stored."""
        packs, tokens = loaded[SEEN].tolist()
        amax = {place: float(loaded[f"{AMAX_PREFIX}{place}"]) for place in self.linears}
        self.quantize(amax, (packs, tokens))


def _operands(
    fake: Fake, amax: Tensor, values: Tensor, input_: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """What a linear multiplies in place of its input and weight."""
    return straight_through(input_, amax, fake), stand_in(weight, values)


def _query_key_value(linear: Any, weight: Tensor) -> list[Tensor]:
    """The rows of queries, keys and values: group by group, queries first."""
    config = linear.config
    head = config.kv_channels
    queries = config.num_attention_heads // config.num_query_groups * head
    return list(weight.unflatten(0, (-1, queries + 2 * head)).split([queries, head, head], dim=1))
