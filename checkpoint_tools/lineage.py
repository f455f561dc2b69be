"""Where a checkpoint comes from: its stage's receipt, those of the stages before it, its origin.

Reads receipts, configs and measurements of the run a checkpoint lies in; a stage folder that import
or assemble made says in `origin.json` what it was made of.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint_tools.published_folder import read_json
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from megatron_vl.run.receipt import Receipt

ORIGIN_FILE = "origin.json"


@dataclass(frozen=True)
class Ancestor:
    """One stage on the way to a checkpoint.

    Attributes:
        receipt: None while the stage has not ended.
        tokens: trained on in all its steps, padding left out; None where nothing is measured.
        origin: what the stage folder was made of, if import or assemble made it.
    """

    name: str
    receipt: Receipt | None
    config: StageConfig
    tokens: int | None
    origin: dict[str, Any] | None


def lineage(stage: StageFolder) -> list[Ancestor]:
    """The stages up to and with `stage`, oldest first; those of its run that receipts link."""
    run = RunFolder(stage.path.parent.parent)
    by_name = {s.name: s for s in run.stages()} if run.exists() else {}
    chain = [stage]
    while True:
        receipt = chain[0].receipt()
        parent = receipt.parent if receipt is not None else None
        if parent is None or parent.stage not in by_name or by_name[parent.stage] in chain:
            return [_ancestor(one) for one in chain]
        chain.insert(0, by_name[parent.stage])


def _ancestor(stage: StageFolder) -> Ancestor:
    steps = step_lines(read_metrics(stage.metrics_path))
    origin = stage.path / ORIGIN_FILE
    return Ancestor(
        name=stage.name,
        receipt=stage.receipt(),
        config=load_stage(stage.config_path),
        tokens=sum(int(line["tokens"]) for line in steps) if steps else None,
        origin=read_json(origin) if origin.is_file() else None,
    )


def describe_origin(origin: dict[str, Any]) -> str:
    """One sentence on what a folder was made of."""
    sources = ", ".join(f"{part} from {Path(name).name}" for part, name in origin["from"].items())
    return f"{origin['made_by']}: {sources}"
