"""Joins two records of `record.py` and says where they part.

Differences are relative L2 norms, tensor by tensor. How much is allowed depends on the arithmetic:
in float32 fixed bounds; in lower precisions what the precision itself costs, measured on one rank
against float32 on the same packs, times a margin. One process, no process group.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

FLOAT32_BOUNDS = {"loss": 1e-5, "gradient": 1e-4, "layer": 1e-4}
"""Relative difference that is rounding in float32, by what is compared."""

PRECISION_MARGIN = 3.0
"""Times the distance of the same arithmetic from float32 on one rank."""

_SMALLEST_BOUND = 1e-6


@dataclass(frozen=True)
class Finding:
    """One tensor of the record.

    Attributes:
        name: embedded, layer.003, token_losses, gradient.KEY or loss.STEP.
        difference: relative L2 distance of the layout from one rank; of several packs the largest.
        bound: the largest that counts as rounding.
    """

    name: str
    difference: float
    bound: float

    @property
    def holds(self) -> bool:
        """Within the bound (not a number is not)."""
        return self.difference <= self.bound


def findings(layout: Path, one_rank: Path, float32: Path | None) -> list[Finding]:
    """Compare the record of a layout with that of one rank, in the order of the computation.

    Args:
        float32: the record of one rank in float32, where the two others are in lower precision.

    Raises:
        ValueError: the records do not hold the same tensors.
    """
    ours, theirs = Record(layout), Record(one_rank)
    if ours.names() != theirs.names():
        odd = sorted(ours.names() ^ theirs.names())
        raise ValueError(f"the two records differ in {len(odd)} tensors, the first: {odd[0]}")
    exact = Record(float32) if float32 is not None else None
    token_cost = 0.0
    largest: dict[str, Finding] = {}
    for name in sorted(ours.names(), key=_place):
        reference = theirs.tensor(name)
        bound = FLOAT32_BOUNDS.get(kind_of(name), FLOAT32_BOUNDS["layer"])
        if exact is not None:
            cost = relative_difference(reference, exact.tensor(name))
            if name.endswith("token_losses"):
                token_cost = max(token_cost, cost)
            elif kind_of(name) == "loss":
                # Errors of tokens may happen to cancel in one sum and not in the other.
                cost = max(cost, token_cost)
            bound = max(PRECISION_MARGIN * cost, _SMALLEST_BOUND)
        difference = relative_difference(ours.tensor(name), reference)
        short = re.sub(r"^pack\.\d+\.", "", name)
        found = Finding(short, difference, bound)
        before = largest.get(short)
        if before is None or difference / bound > before.difference / before.bound:
            largest[short] = found
    return list(largest.values())


def relative_difference(one: Tensor, other: Tensor) -> float:
    """L2 norm of the difference over that of `other`; 0 where both are 0."""
    distance = float((one.double() - other.double()).norm())
    return distance / max(float(other.double().norm()), 1e-30) if distance else 0.0


def kind_of(name: str) -> str:
    """The kind of a tensor of the record: loss, gradient, or what flows between layers."""
    return name.partition(".")[0]


def _place(name: str) -> tuple[int, str]:
    """Sort key: embedded, layers, token losses, losses, gradients."""
    order = ("embedded", "layer", "token_losses", "loss", "gradient")
    short = re.sub(r"^pack\.\d+\.", "", name)
    return order.index(kind_of(short)), short


class Record:
    """The files that the ranks of one run have written."""

    def __init__(self, folder: Path) -> None:
        self._where: dict[str, list[tuple[Path, str]]] = {}
        for file in sorted(folder.glob("rank_*.safetensors")):
            with safe_open(file, "pt") as opened:
                for stored in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                    self._where.setdefault(stored.partition("@")[0], []).append((file, stored))
        if not self._where:
            raise ValueError(f"{folder} holds no record; the ranks have written nothing")

    def names(self) -> set[str]:
        """What was recorded."""
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        """One tensor, whole."""
        parts = list(self._parts(name))
        if parts[0][1] is None:
            return parts[0][0]
        whole = torch.full(parts[0][2], float("nan"), dtype=parts[0][0].dtype)
        for part, offsets, _ in parts:
            assert offsets is not None
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, part.shape, strict=True))] = part
        return whole

    def _parts(self, name: str) -> Iterator[tuple[Tensor, tuple[int, ...] | None, tuple[int, ...]]]:
        for file, stored in self._where[name]:
            with safe_open(file, "pt") as opened:
                part = opened.get_tensor(stored)
            _, *places = stored.split("@")
            if not places:
                yield part, None, tuple(part.shape)
                continue
            offsets, shape = (tuple(int(n) for n in place.split("x")) for place in places)
            yield part.view(part.shape[-len(shape) :]), offsets, shape
