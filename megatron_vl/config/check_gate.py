"""The rules of a gate section that types cannot express."""

import math
from collections.abc import Iterator

from megatron_vl.config.schema_gate import ACTIONS, GateConfig


def check_gate(gate: GateConfig) -> list[str]:
    """Every rule that a gate breaks by itself; empty when it is sound."""
    return list(_problems(gate))


def _problems(gate: GateConfig) -> Iterator[str]:
    if gate.otherwise not in ACTIONS:
        yield f"gate.otherwise is {gate.otherwise!r}, expected one of {', '.join(ACTIONS)}"
    compares = bool(gate.drop_at_most or gate.rise_at_most)
    if compares and not gate.reference:
        yield (
            "gate.drop_at_most and gate.rise_at_most compare with gate.reference, which names no "
            "stage; set gate.reference"
        )
    if gate.reference and not compares:
        yield (
            f"gate.reference is {gate.reference!r}, which only gate.drop_at_most and "
            "gate.rise_at_most read; set one of them or leave it out"
        )
    if gate.asks and (gate.otherwise == "branch") != bool(gate.branch_to):
        yield (
            f"gate.otherwise is {gate.otherwise} and gate.branch_to is {gate.branch_to!r}; the "
            "stage to branch to is named exactly where otherwise is branch"
        )
    if gate.branch_to and not gate.asks:
        yield f"gate.branch_to is {gate.branch_to!r}, but the gate has no bound"
    for key in ("at_least", "at_most", "drop_at_most", "rise_at_most"):
        for metric, bound in getattr(gate, key).items():
            if not math.isfinite(bound):
                yield f"gate.{key}.{metric} is {bound}, must be a number"
            elif key in ("drop_at_most", "rise_at_most") and bound < 0:
                yield f"gate.{key}.{metric} is {bound}, must be at least 0; nearest valid: 0"
