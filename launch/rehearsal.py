"""`mvl submit --rehearse`: a large recipe's graph at the laptop's sizes, on the user's own cluster.

Before a large run the same scripts, container, mounts, requeues, releases and gates are tried with
a model that trains in seconds. Every stage becomes the laptop recipe's stage of that name with a
few steps, on two nodes at most, split along the axes that the large stage splits; starting weights
are the laptop's; evaluations and releases stay as they are, but no gate holds the chain, because a
tiny model passes none. The recipe so made lies in the run folder and is an ordinary one.

Refuses a stage that the laptop recipe does not have. Costs nothing but the steps.
"""

from pathlib import Path
from typing import Any

import yaml

from launch.site_schema import SiteConfig
from launch.snapshot import ROOT
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from megatron_vl.config.load_node import node_kind
from megatron_vl.config.read_yaml import read_mapping
from megatron_vl.config.recipe import Entry, Recipe
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import AssembleNode, Work
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder

TWIN = ROOT / "stages" / "laptop"
STEPS = 4
MOST_NODES = 2
_FOLDER = "rehearsal"


def write_rehearsal(recipe: Recipe, run: RunFolder, site: SiteConfig) -> Path:
    """Write the small recipe into the run folder; returns its folder. Raises ConfigError."""
    folder = run.path.resolve() / _FOLDER
    problems: list[str] = []
    texts: dict[str, str] = {}
    for entry in recipe.entries:
        if isinstance(entry.config, StageConfig | AssembleNode):
            twin = TWIN / entry.path.name
            if not twin.is_file():
                known = ", ".join(sorted(path.stem for path in TWIN.glob("*.yaml")))
                problems.append(f"{entry.name}: {TWIN} has no stage of that name; it has {known}")
                continue
            made = _weights(twin) if node_kind(twin) else _stage(entry, twin, recipe, site)
        else:
            made = _node(entry.path)
        texts[entry.path.name] = yaml.safe_dump(made)
    if problems:
        raise ConfigError(problems)
    for name, text in texts.items():
        atomic.write_text(folder / name, text)
    return folder


def _weights(twin: Path) -> dict[str, Any]:
    """The twin's starting weights, wherever the run is submitted from."""
    made = read_mapping(twin)[0]
    return made | {key: str(ROOT / made[key]) for key in ("decoder", "encoder")}


def _node(path: Path) -> dict[str, Any]:
    """A node as it is; its gate judges and writes its verdict down, but holds nothing."""
    made = read_mapping(path)[0]
    if "gate" in made:
        made["gate"] = {k: v for k, v in made["gate"].items() if k != "branch_to"}
        made["gate"]["otherwise"] = "continue"
    return made


def _stage(entry: Entry, twin: Path, recipe: Recipe, site: SiteConfig) -> dict[str, Any]:
    """A stage file over the twin's: its steps, layout and batch."""
    parallel = _layout(entry.config, site)
    data = parallel["data"]
    made: dict[str, Any] = {
        "base": str(twin),
        "name": entry.name,
        "parallel": parallel,
        "train": {"steps": STEPS, "global_batch": data},
        "evaluation": {"every": 0, "batches": 1, "packs": data},
        "checkpoint": {"every": STEPS // 2},
    }
    context = parallel["context"]
    if context > 1:
        made["data"] = {"document_alignment": 2 * context * parallel["tensor"]}
    if load_stage(twin).data.order.name == "aligned":
        made.setdefault("data", {})["aligned_packs"] = data
    parents = recipe.graph.parents[entry.name]
    return made | ({"after": parents[0]} if parents else {})


def _layout(config: Work, site: SiteConfig) -> dict[str, Any]:
    """Two ranks on each axis the large stage splits; data takes the rest of two nodes."""
    places = MOST_NODES * site.nodes.tasks
    tensor = context = 1
    sequence = False
    if isinstance(config, StageConfig):
        tensor = min(2, config.parallel.tensor, places)
        context = min(2, config.parallel.context, places // tensor)
        sequence = config.parallel.sequence and tensor > 1
    return {
        "tensor": tensor,
        "pipeline": 1,
        "context": context,
        "sequence": sequence,
        "data": places // (tensor * context),
    }
