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


def lineage(stage: StageFolder, config: StageConfig) -> list[Ancestor]:
    """The stages up to and with `stage`, oldest first; those of its run that receipts link.

    Args:
        config: of `stage`.
    """
    run = RunFolder(stage.path.parent.parent)
    by_name = {s.name: s for s in run.stages()} if run.exists() else {}
    chain = [stage]
    while True:
        receipt = chain[0].receipt()
        parent = receipt.parent if receipt is not None else None
        if parent is None or parent.stage not in by_name or by_name[parent.stage] in chain:
            before = [_ancestor(one, load_stage(one.config_path)) for one in chain[:-1]]
            return [*before, _ancestor(stage, config)]
        chain.insert(0, by_name[parent.stage])


def _ancestor(stage: StageFolder, config: StageConfig) -> Ancestor:
    steps = step_lines(read_metrics(stage.metrics_path))
    origin = stage.path / ORIGIN_FILE
    return Ancestor(
        name=stage.name,
        receipt=stage.receipt(),
        config=config,
        tokens=sum(int(line["tokens"]) for line in steps) if steps else None,
        origin=read_json(origin) if origin.is_file() else None,
    )


def longest_sequence(ancestors: list[Ancestor]) -> int:
    """Tokens of the longest sequence that any of the stages trained on.

    Not the last one's: a distillation on short packs does not shorten what a model can read.
    """
    return max(one.config.data.sequence_length for one in ancestors)


def describe_origin(origin: dict[str, Any]) -> str:
    """One sentence on what a folder was made of."""
    sources = ", ".join(f"{part} from {_told(part, name)}" for part, name in origin["from"].items())
    return f"{origin['made_by']}: {sources}"


def _told(part: str, folder: str) -> str:
    """A folder's name; with its parent's where it is named after the part alone."""
    path = Path(folder)
    return f"{path.parent.name}/{path.name}" if path.name == part else path.name
