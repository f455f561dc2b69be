"""The largest inputs of the decoder's linears: what their activations are quantized by.

What: `InputAmax` records them while packs run through a model and agrees on them over all ranks;
`published` names them as an `amax.safetensors` does, `MODULE.input_amax` (query, key and value are
three modules with one input).
What it refuses (ValueError): layers of Transformer Engine, whose norm and product are one kernel;
an input that was never seen, is zero throughout, infinite or NaN. What it costs: a pass over each
input, three small messages in all.

The decoder's linears are all that a quantized release quantizes; encoder, projector, embeddings,
output layer and convolutions are none.
"""

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial

import torch
import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vl.engine.fp8_linear import Fp8Capable
from megatron_vl.engine.fp8_state import Place, own_linears
from megatron_vl.engine.platform import PLATFORM

SUFFIX = ".input_amax"
_PUBLISHED = {
    "mixer.in_proj": ("in_proj",),
    "mixer.out_proj": ("out_proj",),
    "mlp.linear_fc1": ("up_proj",),
    "mlp.linear_fc2": ("down_proj",),
    "self_attention.linear_qkv": ("q_proj", "k_proj", "v_proj"),
    "self_attention.linear_proj": ("o_proj",),
}


def decoder_linears(module: nn.Module) -> dict[Place, Fp8Capable]:
    """This rank's linears of the decoder, in the order of the model.

    Raises:
        ValueError: they are Transformer Engine's.
    """
    found = {p: linear for p, linear in own_linears(module) if p.layer.startswith("decoder.")}
    if not found:
        raise ValueError(
            "the decoder's linears are Transformer Engine's, whose inputs cannot be seen; build "
            "the model with engine.layer_specs.open_blocks"
        )
    return found


def published(largest: Mapping[Place, float], groups: ProcessGroupCollection) -> dict[str, float]:
    """The largest inputs of all pipeline stages by the names of an `amax.safetensors`.

    Args:
        largest: those of this rank's linears, the same on all ranks of the stage.
    """
    here = {
        f"language_model.backbone.layers.{place.layer.removeprefix('decoder.')}.mixer.{name}"
        f"{SUFFIX}": value
        for place, value in largest.items()
        for name in _PUBLISHED[place.linear]
    }
    stages: list[dict[str, float]] = [{}] * groups.pp.size()
    torch.distributed.all_gather_object(stages, here, group=groups.pp)
    return {name: value for stage in stages for name, value in stage.items()}


class InputAmax:
    """The largest magnitude of each linear's input so far.

    Args:
        linears: this rank's, see `decoder_linears`.
    """

    def __init__(self, linears: Mapping[Place, Fp8Capable]) -> None:
        self._linears = linears
        self._largest_I = torch.zeros(len(linears), device=PLATFORM.device)

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """While open, forward passes are recorded; what else is done to operands rests."""
        before = [linear.operands for linear in self._linears.values()]
        for index, linear in enumerate(self._linears.values()):
            linear.operands = partial(self._see, index)
        try:
            yield
        finally:
            for linear, operands in zip(self._linears.values(), before, strict=True):
                linear.operands = operands

    @torch.no_grad()
    def _see(self, index: int, input_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        if input_.numel():
            found = largest_magnitude(input_.detach())
            self._largest_I[index] = torch.maximum(self._largest_I[index], found)
        return input_, weight

    def agreed(self, groups: ProcessGroupCollection) -> dict[Place, float]:
        """What all ranks that share this one's linears saw together.

        Raises:
            ValueError: an input of any stage was never seen, or is zero throughout, infinite or
                NaN; the same error on all ranks.
        """
        # A maximum over ranks may drop a NaN.
        largest_I = self._largest_I.nan_to_num(nan=torch.inf, posinf=torch.inf)
        for group in (groups.tp, groups.dp_cp):
            torch.distributed.all_reduce(largest_I, torch.distributed.ReduceOp.MAX, group=group)
        found = dict(zip(self._linears, largest_I.tolist(), strict=True))
        broken = {str(p): value for p, value in found.items() if not 0 < value < torch.inf}
        stages: list[dict[str, float]] = [{}] * groups.pp.size()
        torch.distributed.all_gather_object(stages, broken, group=groups.pp)
        for place, value in (item for stage in stages for item in stage.items()):
            raise ValueError(
                f"the largest input of {place} is {value}; calibrate on packs that reach it, with "
                "weights whose activations are finite"
            )
        return found


def largest_magnitude(values: Tensor) -> Tensor:
    """The largest magnitude, 0-dim float32; NaN where there is one."""
    lowest, highest = values.aminmax()
    return torch.maximum(-lowest, highest).float()
