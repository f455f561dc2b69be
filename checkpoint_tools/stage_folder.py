"""Writes a stage folder around a streamed checkpoint: what import and assemble leave behind.

    OUT/config.yaml                     the stage as it resolves
    OUT/checkpoints/step_000000/        the weights, loadable at any layout
    OUT/origin.json                     what it was made of, with the hash of every stored tensor
    OUT/receipt.json                    done, with the checkpoint's digest
    OUT/tokenizer/tokenizer.json        where the source had one

So `mvl generate OUT`, `mvl checkpoint export OUT` and `explain OUT` work as on a trained stage; as
`runs/NAME/stages/00_init` it is the parent that the next stage of that run asks for.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from checkpoint_tools.lineage import ORIGIN_FILE
from checkpoint_tools.streaming import (
    Record,
    Report,
    Stream,
    Task,
    plan_shards,
    spec_of,
)
from checkpoint_tools.tensor_bytes import DTYPE_NAMES
from checkpoint_tools.torch_dist import archive_places, plan_file, write_index
from checkpoint_tools.workspace import Workspace
from megatron_vl.config.load import config_hash, to_yaml
from megatron_vl.config.schema import StageConfig
from megatron_vl.data.prepare import TOKENIZER_FILE
from megatron_vl.run.digest import FollowedDigest
from megatron_vl.run.receipt import CheckpointRef, Receipt, now, write_receipt
from megatron_vl.run.versions import versions
from megatron_vl.train.checkpoint import STATE_FILE, LoopState, step_folder

FILE_BYTES = 4 * 10**9
"""Most bytes of one file of the checkpoint."""


@dataclass(frozen=True)
class Origin:
    """What a stage folder is made of.

    Attributes:
        made_by: the command.
        sources: folder by what was taken from it.
        drawn: what no source gave and how it was initialised, one sentence each.
    """

    made_by: str
    sources: dict[str, Path]
    drawn: list[str]


def _file_name(number: int, _: int) -> str:
    return f"__0_{number}.distcp"


@dataclass(frozen=True)
class Streamed:
    """Where the tensors of a stage folder come from.

    Attributes:
        tasks: every stored tensor of the model, by the inputs it is made of.
        read: gives an input.
        expected: recorded SHA-256 of inputs.
        identity: what tells that the sources are still the same, as JSON values.
    """

    tasks: list[Task]
    read: Callable[[str], Tensor]
    expected: Mapping[str, str]
    identity: Any


def write_stage_folder(
    out: Path,
    config: StageConfig,
    origin: Origin,
    streamed: Streamed,
    tokenizer: Path | None,
    report: Report,
) -> None:
    """Stream the weights and complete the folder.

    Raises:
        ConversionError: OUT exists, or an input is not what its hash says.
    """
    started = now()
    shards = plan_shards(streamed.tasks, FILE_BYTES, _file_name)
    specs = {name: spec for shard in shards for name, spec in shard.specs.items()}
    plan = {
        "what": origin.made_by,
        "config": config_hash(config),
        "shards": [
            [s.file, {n: [DTYPE_NAMES[t.dtype], list(t.shape)] for n, t in s.specs.items()}]
            for s in shards
        ],
        "source": streamed.identity,
    }
    places = {
        name: (shard.file, *place)
        for shard in shards
        for name, place in archive_places(shard.specs).items()
    }
    with Workspace(out, plan) as workspace:
        checkpoint = step_folder(workspace.path / "checkpoints", 0)
        checkpoint.mkdir(parents=True, exist_ok=True)
        # What frames the weights first: then their digest can be taken while they are written.
        write_index(checkpoint, specs, places, _file_name(len(shards), 0))
        state = LoopState(config.name, 0, 0, optimizer=False, trainable=[])
        (checkpoint / STATE_FILE).write_text(json.dumps(asdict(state), indent=1) + "\n")
        weights = {shard.file: plan_file(shard.specs).size for shard in shards}
        rest = {p.name: p.stat().st_size for p in checkpoint.iterdir() if p.name not in weights}
        with FollowedDigest(checkpoint, {**weights, **rest}) as digest:
            for name, size in rest.items():
                digest.grown(name, size)
            stream = Stream(
                streamed.read,
                workspace,
                checkpoint,
                plan_file,
                report,
                streamed.expected,
                digest.grown,
            )
            records = stream.run(shards)
            saved = CheckpointRef(f"checkpoints/{checkpoint.name}", digest.result())
        (workspace.path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
        (workspace.path / ORIGIN_FILE).write_text(
            json.dumps(_origin_json(origin, records), indent=1) + "\n"
        )
        if tokenizer is not None:
            kept = workspace.path / TOKENIZER_FILE
            kept.parent.mkdir(exist_ok=True)
            shutil.copyfile(tokenizer, kept)
        write_receipt(
            workspace.path / "receipt.json", _receipt(out, config, origin, saved, started)
        )
        workspace.publish()


def _origin_json(origin: Origin, records: dict[str, Record]) -> dict[str, Any]:
    return {
        "schema": 1,
        "made_by": origin.made_by,
        "from": {part: str(folder) for part, folder in origin.sources.items()},
        "drawn": origin.drawn,
        "tensors": {
            name: {"sha256": entry["sha256"], **_spec_json(entry)}
            for record in records.values()
            for name, entry in record.items()
        },
        "versions": versions(),
    }


def _spec_json(entry: dict[str, Any]) -> dict[str, Any]:
    spec = spec_of(entry)
    return {"dtype": DTYPE_NAMES[spec.dtype], "shape": list(spec.shape)}


def _receipt(
    out: Path, config: StageConfig, origin: Origin, saved: CheckpointRef, started: str
) -> Receipt:
    names = ", ".join(f"{part} from {folder.name}" for part, folder in origin.sources.items())
    return Receipt(
        run=out.resolve().parent.parent.name,
        stage=config.name,
        status="done",
        reason=f"{origin.made_by}: {names}",
        step=0,
        attempts=1,
        checkpoint=saved,
        parent=None,
        config_hash=config_hash(config),
        data_cursor=0,
        trainable=[],
        started=started,
        ended=now(),
        versions=versions(),
    )
