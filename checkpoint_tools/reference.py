"""The checkpoint as this project's own model, filled straight from its files.

What: the model of a stage on one process, its weights as they are stored, as a release rounds them,
or as a quantized release gives them back; and which of its linears a release quantizes.
Why not the trainer's loader: here every weight passes the release's arithmetic on its way, tensor
by tensor, so the model is what the release should be.
What it costs: the model in memory and one read of the checkpoint.
"""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from checkpoint_tools.names import NameTable, Rule
from checkpoint_tools.quantized_layout import applies
from checkpoint_tools.stage_source import StageSource
from megatron_vl.config.schema import Precision
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.calibrate import plain_model

Weights = Callable[[Rule, Sequence[Tensor]], Sequence[Tensor]]
"""From a rule and its stored tensors to those the model gets."""
_PIECE = re.compile(r"(\.(?:weight|bias))\.\w+$")
"""A stored tensor may be a piece of a parameter: `in_proj.weight.z`."""


def as_stored(rule: Rule, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The checkpoint's own weights."""
    return tensors


@contextlib.contextmanager
def reference_model(
    source: StageSource, weights: Weights = as_stored, precision: Precision | None = None
) -> Iterator[VisionLanguageModel]:
    """The checkpoint's model with its weights in place.

    Args:
        precision: see `plain_model`.
    """
    with plain_model(source.config, precision) as module:
        fill(module, source, weights)
        yield module


@torch.no_grad()
def fill(module: VisionLanguageModel, source: StageSource, weights: Weights) -> None:
    """Put the checkpoint's tensors into a model, rule by rule."""
    parameters = dict(module.named_parameters())
    for rule in source.table.rules:
        stored = [source.checkpoint.read(slot.name) for slot in rule.stored]
        pieces = list(weights(rule, stored))
        whole = torch.cat(pieces) if len(pieces) > 1 else pieces[0]
        parameters.pop(parameter_of(rule)).copy_(whole)
    assert not parameters, f"no tensor of the checkpoint is {next(iter(parameters))}"


def parameter_of(rule: Rule) -> str:
    """The model's parameter that a rule's stored tensors make up."""
    return _PIECE.sub(r"\1", rule.stored[0].name)


def quantized_linears(table: NameTable) -> dict[str, Rule]:
    """The linears that a release quantizes, as the model's modules, with their rules."""
    return {
        parameter_of(rule).removesuffix(".weight"): rule for rule in table.rules if applies(rule)
    }
