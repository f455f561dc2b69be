"""The schema of recipe files that do not train: `node: assemble`, `evaluate` or `release`.

A node runs as one process between or behind the training stages, with attempts, logs and a receipt
like theirs. One dataclass a kind, one docstring per field, in the form of `schema.py`. What a node
runs is another `mvl` command: its own options can be passed on in `arguments`.
"""

from dataclasses import dataclass, field
from enum import Enum

from omegaconf import MISSING

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_gate import GateConfig


class NodeKind(Enum):
    """What a node does."""

    assemble = "assemble"
    evaluate = "evaluate"
    release = "release"


@dataclass
class AssembleNode:
    """Starting weights from a released decoder and a released encoder; the head of a recipe."""

    name: str = MISSING
    """Name of the node, that of its file; usually init. [string; run]"""
    node: NodeKind = NodeKind.assemble
    """What the node does. [choice; launch]"""
    like: str = MISSING
    """Stage of the recipe whose model the two are put together as. [stage; launch]"""
    decoder: str = MISSING
    """Folder of the released nemotron_h decoder in Hugging Face's form. [path; checkpoint_tools]"""
    encoder: str = MISSING
    """Folder of the released RADIO encoder in Hugging Face's form. [path; checkpoint_tools]"""


@dataclass
class EvaluateNode:
    """Metrics of its parent's checkpoint, and a gate on them; passes the checkpoint on."""

    name: str = MISSING
    """Name of the node, that of its file. [string; run]"""
    node: NodeKind = NodeKind.evaluate
    """What the node does. [choice; launch]"""
    after: str = MISSING
    """Stage whose checkpoint is evaluated. [stage; launch]"""
    suites: list[str] = field(default_factory=list)
    """Suites that `mvl evaluate` runs. [names; infer]"""
    command: str = ""
    """A command that measures instead: `mvl evaluate --command`, in whose words {checkpoint} and
    {results} become the parent's checkpoint and the place for what it writes. [words; infer]"""
    arguments: list[str] = field(default_factory=list)
    """Further options of `mvl evaluate`, such as ["--limit", "20"] or ["--reader", "nemo_skills"].
    [words; infer]"""
    gate: GateConfig = field(default_factory=GateConfig)
    """What the metrics must be. [section; launch]"""


@dataclass
class ReleaseNode:
    """Exports in published formats, each certified from disk; written to RUN/NAME."""

    name: str = MISSING
    """Name of the node, that of its file, and of the folder in the run folder. [string; run]"""
    node: NodeKind = NodeKind.release
    """What the node does. [choice; launch]"""
    formats: dict[str, str] = MISSING
    """Stage to export by format: bf16, fp8 or nvfp4. [stages by format; checkpoint_tools]"""
    arguments: list[str] = field(default_factory=list)
    """Further options of `mvl checkpoint release`. [words; checkpoint_tools]"""
    gate: GateConfig = field(default_factory=GateConfig)
    """What the metrics of the certificates must be. [section; launch]"""


NodeConfig = AssembleNode | EvaluateNode | ReleaseNode
Work = StageConfig | NodeConfig
"""What one file of a recipe says: a training stage or a node."""
SCHEMAS: dict[NodeKind, type[AssembleNode] | type[EvaluateNode] | type[ReleaseNode]] = {
    NodeKind.assemble: AssembleNode,
    NodeKind.evaluate: EvaluateNode,
    NodeKind.release: ReleaseNode,
}
FORMATS = ("bf16", "fp8", "nvfp4")
"""What a release can hold."""
RESERVED = ("stages", "code")
"""Names of the run folder that no release may take."""
