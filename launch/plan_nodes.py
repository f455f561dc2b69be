"""The nodes of a recipe and its gates, for `mvl plan`: what runs between and behind the stages."""

from collections.abc import Sequence
from dataclasses import dataclass

from launch.tables import print_table
from megatron_vl.config.recipe import Recipe, gate_of
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_gate import GateConfig
from megatron_vl.config.schema_node import AssembleNode, EvaluateNode, ReleaseNode, Work

_BOUNDS = (
    ("at_least", "{} at least {}"),
    ("at_most", "{} at most {}"),
    ("drop_at_most", "{} at most {} below {}"),
    ("rise_at_most", "{} at most {} above {}"),
)


@dataclass(frozen=True)
class NodePlan:
    """One file of a recipe that does not train, or a stage behind which a gate stands."""

    name: str
    does: str
    after: list[str]
    gate: str
    """Its bounds and what follows when one does not hold; empty without a gate."""


def plan_nodes(recipe: Recipe, names: Sequence[str]) -> list[NodePlan]:
    """The nodes and gates among some names, in the order they run."""
    return [
        NodePlan(
            entry.name,
            _does(entry.config),
            list(recipe.graph.parents[entry.name]),
            _gate(gate_of(entry.config)),
        )
        for entry in recipe.entries
        if entry.name in names
        if not isinstance(entry.config, StageConfig) or entry.config.gate.asks
    ]


def _does(work: Work) -> str:
    if isinstance(work, AssembleNode):
        return f"puts {work.decoder} and {work.encoder} together as {work.like}"
    if isinstance(work, EvaluateNode):
        return f"evaluates: {' '.join(work.suites) or work.command}"
    if isinstance(work, ReleaseNode):
        made = ", ".join(f"{form} of {stage}" for form, stage in work.formats.items())
        return f"exports and certifies {made}"
    return "trains"


def _gate(gate: GateConfig) -> str:
    bounds = [
        words.format(metric, bound, gate.reference)
        for key, words in _BOUNDS
        for metric, bound in getattr(gate, key).items()
    ]
    if not bounds:
        return ""
    otherwise = f"branch to {gate.branch_to}" if gate.branch_to else gate.otherwise
    return f"{'; '.join(bounds)}; otherwise {otherwise}"


def print_nodes(found: Sequence[NodePlan]) -> None:
    """A table of the nodes and gates."""
    rows = [(node.name, node.does, ", ".join(node.after), node.gate) for node in found]
    print_table("nodes and gates", ("name", "does", "after", "gate"), rows, left=4)
