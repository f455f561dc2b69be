"""`mvl checkpoint explain`: who made a checkpoint or a published folder, from what, and what it
holds.

Reads receipts, state file, index and headers; weights only when asked to verify. A published folder
answers from the `provenance.json` that export put into it.
"""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.lineage import Ancestor, describe_origin
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NameTable, Slot, compare
from checkpoint_tools.published_config import model_of
from checkpoint_tools.published_folder import CONFIG_FILE, PublishedFolder, read_json
from checkpoint_tools.quantized_layout import applies, described, outputs
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.stage_source import StageSource, open_stage
from checkpoint_tools.tensor_bytes import DTYPE_NAMES, sha256
from megatron_vl.config.load import config_hash
from megatron_vl.config.schema import WeightSource
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.parameters import model_parameters

PROVENANCE_FILE = "provenance.json"
CHECKPOINT = "checkpoint"
_TOLD = ("run", "status", "reason", "attempts", "started", "ended", "metrics", "gate", "versions")
"""What of a receipt is passed on."""


def explain(path: Path, *, verify: bool = False) -> dict[str, Any]:
    """What is known about a run's last checkpoint, a stage's, a checkpoint or a published folder.

    Args:
        verify: read all weights and compare them with the recorded digest or hashes.

    Raises:
        ConversionError, RunError: it is none of these, or is not what its records say.
    """
    if (path / CONFIG_FILE).is_file():
        return _explain_published(path, verify)
    source = open_stage(path)
    if verify:
        if source.receipt is None:
            raise ConversionError(f"{path}: no receipt names this checkpoint, so it has no digest")
        source.check_digest()
    return {
        "kind": CHECKPOINT,
        "path": str(source.checkpoint.folder),
        **provenance(source),
        "verified": verify,
        "tensors": _tensors(source.checkpoint.tensors, source.config.model),
        "training_state": _sizes(
            {
                name: spec
                for name, spec in source.checkpoint.stored.items()
                if name not in source.checkpoint.tensors
            }
        ),
    }


def provenance(source: StageSource) -> dict[str, Any]:
    """Who made a checkpoint, from what data and stages: JSON values, no place on this machine."""
    receipt, state = source.receipt, source.state
    digest = receipt.checkpoint.digest if receipt and receipt.checkpoint else None
    return {
        "stage": state.stage,
        "step": state.step,
        "data_cursor": state.data_cursor,
        "holds_optimizer": state.optimizer,
        "trainable": state.trainable,
        "digest": digest,
        "parent_digest": state.parent or None,
        "config_hash": config_hash(source.config),
        "receipt": _receipt(source),
        "lineage": [_stage(one) for one in source.ancestors],
    }


def _receipt(source: StageSource) -> dict[str, Any] | None:
    if source.receipt is None:
        return None
    return {name: value for name, value in asdict(source.receipt).items() if name in _TOLD}


def _stage(one: Ancestor) -> dict[str, Any]:
    receipt, data = one.receipt, one.config.data
    if one.origin is not None:
        came_from = describe_origin(one.origin)
    elif one.config.carry.weights is WeightSource.random:
        came_from = f"weights drawn with seed {one.config.train.seed}"
    else:
        came_from = receipt.parent.stage if receipt and receipt.parent else "unknown"
    return {
        "stage": one.name,
        "from": came_from,
        "drawn": one.origin["drawn"] if one.origin else [],
        "status": receipt.status if receipt else "no receipt",
        "steps": receipt.step if receipt else None,
        "trainable": receipt.trainable if receipt else [],
        "blend": data.blend,
        "packs": receipt.data_cursor if receipt else None,
        "sequence_length": data.sequence_length,
        "tokens": one.tokens,
        "gate": receipt.gate if receipt else {},
    }


def _explain_published(path: Path, verify: bool) -> dict[str, Any]:
    folder = PublishedFolder(path)
    model = model_of(folder.config)
    check_published_folder(folder, name_table(model))
    if verify:
        if not folder.sha256:
            raise ConversionError(f"{path} records no hashes, so nothing can be verified")
        for name, digest in folder.sha256.items():
            if sha256(folder.read(name)) != digest:
                raise ConversionError(
                    f"{path / folder.file_of(name)}: {name} is not what its recorded SHA-256 says"
                )
    made = path / PROVENANCE_FILE
    return {
        "kind": "published folder",
        "path": str(path),
        **(read_json(made) if made.is_file() else {"receipt": None, "lineage": []}),
        "verified": verify,
        "hashes": len(folder.sha256),
        "tensors": _tensors(folder.tensors, model),
    }


def check_published_folder(folder: PublishedFolder, table: NameTable) -> None:
    """Raise NamesError unless a folder, quantized or not, holds exactly its model's tensors."""
    chosen, shapes = described(folder.config), folder.shapes()
    if chosen is not None:
        rules = [rule for rule in table.rules if applies(rule)]
        made = {n: Slot(n, s.shape) for rule in rules for n, s in outputs(rule, chosen).items()}
        held = {name: shape for name, shape in shapes.items() if name in made}
        compare(made, held, str(folder.folder), "quantized")
        shapes = {name: shape for name, shape in shapes.items() if name not in made}
        table = replace(table, rules=tuple(rule for rule in table.rules if not applies(rule)))
    table.check_published(shapes, str(folder.folder))


def _tensors(tensors: Mapping[str, TensorSpec], model: ModelConfig) -> dict[str, Any]:
    return {
        **_sizes(tensors),
        "parameters": model_parameters(model).by_part(),
        "pattern": model.decoder.pattern,
        "vocabulary": model.vocab_size,
    }


def _sizes(tensors: Mapping[str, TensorSpec]) -> dict[str, Any]:
    by_dtype: dict[str, int] = {}
    for spec in tensors.values():
        name = DTYPE_NAMES[spec.dtype]
        by_dtype[name] = by_dtype.get(name, 0) + spec.num_bytes
    return {"count": len(tensors), "bytes_by_dtype": by_dtype}
