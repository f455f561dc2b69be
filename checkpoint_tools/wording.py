"""Sizes and measurements as a reader wants them; what `explain` and the model card share."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

_EVALUATED, _SPLITS = "eval", ("source", "modality")


def size_text(num_bytes: int) -> str:
    """Bytes in the unit that leaves one to three digits: 812 B, 2.9 MB, 24.6 GB."""
    size, units = float(num_bytes), ["B", "kB", "MB", "GB", "TB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.0f} B" if units[0] == "B" else f"{size:.3g} {units[0]}"


@dataclass
class Evaluation:
    """Losses on one held-out set.

    Attributes:
        whole: over all of it; None where only its parts were measured.
        source, modality: by part.
    """

    whole: float | None = None
    source: dict[str, float] = field(default_factory=dict)
    modality: dict[str, float] = field(default_factory=dict)


def evaluations(metrics: Mapping[str, Any]) -> dict[str, Evaluation]:
    """A receipt's `eval/SET`, `eval/SET/source/NAME` and `eval/SET/modality/NAME`, by set."""
    found: dict[str, Evaluation] = {}
    for name, value in metrics.items():
        parts = name.split("/")
        if parts[0] != _EVALUATED or not isinstance(value, float):
            continue
        if len(parts) == 2:
            found.setdefault(parts[1], Evaluation()).whole = value
        elif len(parts) == 4 and parts[2] in _SPLITS:
            getattr(found.setdefault(parts[1], Evaluation()), parts[2])[parts[3]] = value
    return found


def numbers_text(numbers: Mapping[str, float]) -> str:
    """Names and numbers in a line, four digits each."""
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())


def other_metrics(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What a receipt says beside the losses of `evaluations`."""
    return {name: value for name, value in metrics.items() if not name.startswith("eval/")}
