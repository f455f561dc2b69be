"""Puts a model's linears into FP8: which ones, by what recipe, and what delayed scaling remembers.

`enable_fp8` runs once, after the model is built. On the torch spec it hands every linear of the
chosen layers its arithmetic (`engine.fp8_linear`); on the Transformer Engine spec it sets
megatron-core's own FP8 fields on the stacks' configs, which are read at every forward pass.
Embeddings, output layer, convolutions and patch embedder are no such linears and stay in BF16.

Delayed scaling: in each step every linear raises one amax for its input, weight and gradient, over
all micro-batches; `advance`, once a step, takes the largest over the tensor, context and data
ranks that share the matrix, so that the layout does not matter, and moves it into the history.
Gradients are remembered as those of the whole batch's loss: in the backward pass they are larger by
the number of ranks that their buffers are averaged over, which another layout may change. The
scales of a step come from the steps before it alone, hence a second forward pass (activation
recompute) computes the same bytes. The history is saved with the optimizer state.

Refuses (ValueError): a device that has no such products; on the Transformer Engine spec delayed
scaling with BF16 ends, layers named in `fp8.keep_bf16`, the drift meter, and images at their native
resolution, whose patches are no multiple of what its products take.

Costs: delayed scaling, two all-reduces of 3 numbers a linear each step.

Shapes: W steps in the window, I linears of this rank, 3 operands.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor, nn

from megatron_vl.config.check_fp8 import TOKEN_MULTIPLE, bf16_layers
from megatron_vl.config.schema import Fp8Config, Precision, StageConfig
from megatron_vl.config.schema_data import Tiling
from megatron_vl.engine.fp8_linear import Arithmetic, Blockwise, Delayed, Fp8Capable, Tensorwise
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.kernels.fp8 import why_unsupported

# Where the layers of a stack hang in the model, and what a stack is called.
STACKS = {"language_model.decoder.layers": "decoder", "vision_model.decoder.layers": "encoder"}
PROJECTOR = "vision_projection"
HISTORY_PREFIX = "fp8.amax_history."


@dataclass(frozen=True)
class Place:
    """Which linear of which layer: `decoder.5`, `mixer.in_proj`; the same at any layout."""

    layer: str
    linear: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.linear}"


class AmaxHistory:
    """The largest magnitudes of the last steps, by linear and operand.

    Args:
        places: this rank's linears in FP8.
        window: steps to remember.
    """

    def __init__(self, places: list[Place], window: int, groups: ProcessGroupCollection) -> None:
        self.places = places
        self._groups = groups
        device = PLATFORM.device
        self.history_WI3 = torch.zeros(window, len(places), 3, device=device)
        self.reference_I3 = torch.zeros(len(places), 3, device=device)
        self.current_I3 = torch.zeros(len(places), 3, device=device)
        self._averaged_3 = torch.tensor([1.0, 1.0, groups.dp_cp.size()], device=device)

    def advance(self) -> None:
        """End a step: agree on its amax, remember it, and forget the oldest."""
        for group in (self._groups.tp, self._groups.dp_cp):
            torch.distributed.all_reduce(
                self.current_I3, torch.distributed.ReduceOp.MAX, group=group
            )
        newest_I3 = self.current_I3 / self._averaged_3
        self.history_WI3 = torch.cat([newest_I3.unsqueeze(0), self.history_WI3[:-1]])
        self.current_I3.zero_()
        self._refer()

    def _refer(self) -> None:
        # In place: the linears hold views.
        self.reference_I3.copy_(self.history_WI3.amax(0) * self._averaged_3)

    def sharded(self) -> dict[str, ShardedTensor]:
        """The history as the checkpoint stores it: a (W, 3) tensor a linear, at any layout."""
        replica = (0, self._groups.tp.rank(), self._groups.dp_cp.rank())
        return {
            f"{HISTORY_PREFIX}{place}": ShardedTensor.from_rank_offsets(
                f"{HISTORY_PREFIX}{place}",
                self.history_WI3[:, index].contiguous(),
                replica_id=replica,
            )
            for index, place in enumerate(self.places)
        }

    def restore(self, loaded: dict[str, Tensor]) -> None:
        """Take over what `sharded` stored; linears that are not in it start without a history."""
        for index, place in enumerate(self.places):
            stored = loaded.get(f"{HISTORY_PREFIX}{place}")
            if stored is not None:
                self.history_WI3[:, index] = stored
        self._refer()


@dataclass
class Fp8Layers:
    """What runs in FP8 on this rank.

    Attributes:
        linears: by place, in the order of the model; empty on the Transformer Engine spec.
        history: what delayed scaling remembers; None for the other recipes.
    """

    linears: dict[Place, Fp8Capable]
    history: AmaxHistory | None = None

    def advance(self) -> None:
        """End an optimizer step."""
        if self.history is not None:
            self.history.advance()


def enable_fp8(
    module: nn.Module, config: StageConfig, groups: ProcessGroupCollection
) -> Fp8Layers | None:
    """Put the linears of a built model into the FP8 recipe of `config.precision`.

    Returns:
        What runs in FP8 on this rank; None where the precision is no FP8.

    Raises:
        ValueError: the device or the layer spec cannot do what is asked.
    """
    if not config.precision.is_fp8:
        return None
    own = list(own_linears(module))
    if not own:
        _refuse_ragged_images(config)
        _set_core_fields(module, transformer_engine_fields(config.precision, config.fp8))
        return Fp8Layers({})
    blockwise = config.precision is Precision.fp8_blockwise
    reason = why_unsupported(PLATFORM.device, blockwise=blockwise)
    if reason is not None:
        other = "bf16 or fp8_tensorwise" if blockwise else "bf16"
        raise ValueError(
            f"precision {config.precision.name} cannot run on this device: {reason}; nearest "
            f"valid: precision {other}"
        )
    kept = bf16_layers(config)
    linears = {place: linear for place, linear in own if place.layer not in kept}
    history = None
    if config.precision is Precision.fp8_delayed:
        history = AmaxHistory(list(linears), config.fp8.amax_history, groups)
    for index, linear in enumerate(linears.values()):
        linear.arithmetic = _arithmetic(blockwise, history, index)
    return Fp8Layers(linears, history)


def _arithmetic(blockwise: bool, history: AmaxHistory | None, index: int) -> Arithmetic:
    if history is not None:
        return Delayed(history.reference_I3[index], history.current_I3[index])
    return Blockwise() if blockwise else Tensorwise()


def own_linears(module: nn.Module) -> Iterator[tuple[Place, Fp8Capable]]:
    """This rank's linears that can run in FP8, by layer, in the order of the model."""
    for name, linear in module.named_modules():
        if isinstance(linear, Fp8Capable):
            yield _place(module, name), linear


def _place(module: nn.Module, name: str) -> Place:
    for prefix, stack in STACKS.items():
        if name.startswith(f"{prefix}."):
            here, _, linear = name.removeprefix(f"{prefix}.").partition(".")
            number: Any = module.get_submodule(f"{prefix}.{here}").layer_number
            return Place(f"{stack}.{number - 1}", linear)
    assert name.startswith(f"{PROJECTOR}."), name
    return Place("projector", name.removeprefix(f"{PROJECTOR}."))


def transformer_engine_fields(precision: Precision, fp8: Fp8Config) -> dict[str, object]:
    """megatron-core's fields for an FP8 recipe on Transformer Engine's layers.

    Raises:
        ValueError: megatron-core cannot do it there.
    """
    ends = fp8.first_layers_bf16 + fp8.last_layers_bf16 > 0
    if precision is Precision.fp8_delayed and ends:
        raise ValueError(
            f"precision fp8_delayed with fp8.first_layers_bf16 {fp8.first_layers_bf16} and "
            f"fp8.last_layers_bf16 {fp8.last_layers_bf16}: on Transformer Engine's layers "
            "megatron-core enters delayed scaling once for a whole stack and refuses layers in "
            "BF16 inside it; nearest valid: precision fp8_blockwise, or 0 for both, or a Python "
            "environment without Transformer Engine, where the torch layer spec can do it"
        )
    for key, value, off in (
        ("keep_bf16", fp8.keep_bf16, "[]"),
        ("drift_every", fp8.drift_every, "0"),
    ):
        if value:
            raise ValueError(
                f"fp8.{key} is {value}, but this machine's layers are Transformer Engine's, which "
                f"have no such switch; nearest valid: {off}"
            )
    recipe = precision.name.removeprefix("fp8_")
    return {
        "fp8": "e4m3" if precision is Precision.fp8_blockwise else "hybrid",
        "fp8_recipe": recipe,
        "fp8_amax_history_len": fp8.amax_history,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": ends,
        "num_layers_at_start_in_bf16": fp8.first_layers_bf16,
        "num_layers_at_end_in_bf16": fp8.last_layers_bf16,
    }


def _refuse_ragged_images(config: StageConfig) -> None:
    tiling = config.data.tiling
    if tiling in (Tiling.native, Tiling.native_matched):
        raise ValueError(
            f"data.tiling is {tiling.name} in precision {config.precision.name}, but this "
            "machine's layers are Transformer Engine's, whose FP8 products take multiples of "
            f"{TOKEN_MULTIPLE} tokens, and whole images have any number; nearest valid: "
            "data.tiling published, precision bf16, or a Python environment without Transformer "
            "Engine, where products are filled up"
        )


def _set_core_fields(module: nn.Module, fields: dict[str, object]) -> None:
    """Set fields on the configs of decoder, encoder and projector, which their layers share."""
    for name, part in module.named_modules():
        if name in (*(prefix.rpartition(".")[0] for prefix in STACKS), PROJECTOR):
            for field, value in fields.items():
                setattr(part.config, field, value)
