"""This project's model with what vLLM does otherwise, and on purpose, done alike.

- The encoder's output is rounded to bfloat16, whatever its type.
- Query, key and value of an FP8 folder, stored with a scale each, are one matrix there: the largest
  scale is taken for all three and the codes are made anew.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from checkpoint_tools.name_rules import name_table
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.quantized_layout import FP8, described
from checkpoint_tools.reference import quantized_linears
from megatron_vl.infer.model import OpenModel


def is_fp8(release: Path) -> bool:
    """Whether a folder's linears are FP8."""
    chosen = described(PublishedFolder(release).config)
    return chosen is not None and chosen.format == FP8


@contextlib.contextmanager
def as_served(model: OpenModel, release: Path) -> Iterator[None]:
    """While open, the model computes as vLLM does.

    Args:
        release: the folder it was opened from.
    """
    encoder = model.module.vision_model
    hook = encoder.register_forward_hook(lambda module, inputs, out: out.bfloat16().to(out.dtype))
    fused = _one_scale(model, release) if is_fp8(release) else {}
    kept = {name: model.module.get_parameter(name).detach().clone() for name in fused}
    try:
        _put(model, fused)
        yield
    finally:
        hook.remove()
        _put(model, kept)


@torch.no_grad()
def _put(model: OpenModel, weights: dict[str, Tensor]) -> None:
    for name, weight in weights.items():
        model.module.get_parameter(name).copy_(weight)


def _one_scale(model: OpenModel, release: Path) -> dict[str, Tensor]:
    """Weights of the linears that hold several published ones, with one scale."""
    published, made = PublishedFolder(release), {}
    for module, rule in quantized_linears(name_table(model.config.model)).items():
        if len(rule.published) == 1:
            continue
        names = [slot.name.removesuffix(".weight") + ".weight_scale" for slot in rule.published]
        scale = torch.stack([published.read(name).float().reshape(()) for name in names]).max()
        weight = model.module.get_parameter(f"{module}.weight").detach()
        # vLLM goes through float16.
        codes = (weight.half().float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        made[f"{module}.weight"] = codes.to(weight.dtype) * scale
    return made
