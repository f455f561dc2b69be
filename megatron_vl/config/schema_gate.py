"""The `gate:` section: what must hold of a finished stage before the ones behind it start.

The same section on stages and on nodes. Metrics are those of the receipt: what an evaluation wrote,
or for a training stage `eval/val`, `loss` and the others that its receipt lists.
"""

from dataclasses import dataclass, field

ACTIONS = ("hold", "branch", "continue")
"""What can follow when a bound does not hold. Text and no enum: `continue` is a word of Python."""


@dataclass
class GateConfig:
    """Bounds on metrics, and what follows when one does not hold."""

    at_least: dict[str, float] = field(default_factory=dict)
    """Smallest allowed value by metric. [as the metric; launch]"""
    at_most: dict[str, float] = field(default_factory=dict)
    """Largest allowed value by metric. [as the metric; launch]"""
    drop_at_most: dict[str, float] = field(default_factory=dict)
    """How far a metric may lie below that of gate.reference. [as the metric; launch]"""
    rise_at_most: dict[str, float] = field(default_factory=dict)
    """How far a metric may lie above that of gate.reference. [as the metric; launch]"""
    reference: str = ""
    """Stage or node with whose metrics drop_at_most and rise_at_most compare. [stage; launch]"""
    otherwise: str = "hold"
    """What follows when a bound does not hold: hold the stages behind it, branch to another, or
    continue and only record it. [hold, branch or continue; launch]"""
    branch_to: str = ""
    """Child that starts only when a bound does not hold, and then instead of the others. [stage;
    launch]"""

    @property
    def asks(self) -> bool:
        """Whether there is anything to judge."""
        return bool(self.at_least or self.at_most or self.drop_at_most or self.rise_at_most)
