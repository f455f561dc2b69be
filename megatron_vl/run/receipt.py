"""The receipt of a stage: the one statement that the next stage, a gate or a person relies on.

It is written last, atomically, by whoever knows the end: the trainer when the stage is done or was
stopped in good order, the supervisor when the trainer could not speak any more. An exit code or a
scheduler's state never stands in for it.

Refuses to read a receipt of another schema, with a missing or unknown key, or of a wrong type.
"""

import dataclasses
import json
import types
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from megatron_vl.run import atomic

SCHEMA = 1
WITH_CHECKPOINT = ("train", "assemble")
"""Kinds of stages whose receipt names a checkpoint once they are done."""
RERUN = ("evaluate", "release")
"""Kinds that run again where what they do or take has changed: nothing is trained from them."""
_LATER = ("kind", "inputs", "outputs")
"""Keys that receipts of earlier versions lack; their defaults are what those meant."""
Status = Literal["done", "incomplete", "failed", "held"]


class ReceiptError(ValueError):
    """A receipt that cannot be trusted; the message names file, key and what is expected."""


@dataclass(frozen=True)
class CheckpointRef:
    """A checkpoint of the stage: its folder, relative to the stage's, and its digest."""

    path: str
    digest: str


@dataclass(frozen=True)
class ParentRef:
    """The stage whose checkpoint this one started from, and that checkpoint's digest."""

    stage: str
    digest: str


@dataclass(frozen=True)
class Seconds:
    """Where the stage's wall time went, over all its attempts."""

    useful: float = 0.0
    lost: float = 0.0
    waiting: float = 0.0


@dataclass(frozen=True)
class Receipt:
    """How a stage ended. Field names are the file contract of `receipt.json`."""

    run: str
    stage: str
    status: Status
    reason: str
    """Why it ended so, in a sentence a person can act on."""
    step: int
    """Optimizer steps whose result the checkpoint holds (the last step seen, without one)."""
    attempts: int
    """Attempts made so far, this one included; the first is 1."""
    checkpoint: CheckpointRef | None
    parent: ParentRef | None
    config_hash: str
    data_cursor: int | None
    """Packs consumed so far in the plan of packs, over all ranks."""
    trainable: list[str]
    started: str
    """Start of the last attempt, ISO 8601 in UTC."""
    ended: str
    metrics: dict[str, Any] = field(default_factory=dict)
    gate: dict[str, Any] = field(default_factory=dict)
    seconds: Seconds = field(default_factory=Seconds)
    versions: dict[str, str] = field(default_factory=dict)
    schema: int = SCHEMA
    kind: str = "train"
    """What made it: a training stage, or a node that assembles, evaluates or releases."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Of a node: the stages it took from, with the digests of their checkpoints."""
    outputs: dict[str, str] = field(default_factory=dict)
    """Of a node: what it left, by path from the run folder, with its digest."""

    @property
    def done(self) -> bool:
        """Whether the next stage may start from this one."""
        return self.status == "done"

    @property
    def held_by_gate(self) -> bool:
        """Whether it ran to its end and only its gate stands before the stages behind it."""
        return self.status == "held" and self.gate.get("decision") == "hold"


def now() -> str:
    """The present moment as receipts and journals write it: ISO 8601 in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def write_receipt(path: Path, receipt: Receipt) -> None:
    """Write a receipt atomically. Raises ReceiptError for one that `read_receipt` would refuse."""
    value = asdict(receipt)
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ReceiptError(f"{path}: a receipt holds JSON values only: {error}") from error
    parse_receipt(json.loads(text), str(path))
    atomic.write_text(path, text + "\n")


def read_receipt(path: Path) -> Receipt:
    """Read a receipt. Raises ReceiptError for a broken one, FileNotFoundError without one."""
    text = path.read_text(encoding="utf-8")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ReceiptError(
            f"{path}: not JSON ({error}); receipts are written whole, so it was edited or damaged"
        ) from error
    return parse_receipt(value, str(path))


def parse_receipt(value: Any, where: str) -> Receipt:
    """A receipt from its JSON value; `where` names it in errors."""
    if not isinstance(value, dict):
        raise ReceiptError(f"{where}: expected an object, found {type(value).__name__}")
    if value.get("schema") != SCHEMA:
        raise ReceiptError(
            f"{where}: schema is {value.get('schema')!r}, this version reads {SCHEMA}; "
            "read it with the version of megatron_vl that wrote it"
        )
    receipt = _parse(Receipt, value, where, "")
    if receipt.done and receipt.kind in WITH_CHECKPOINT and receipt.checkpoint is None:
        raise ReceiptError(f"{where}: status is done, but checkpoint is null")
    return receipt


def _parse(kind: Any, value: Any, where: str, key: str) -> Any:
    """A value of type `kind` from JSON, or ReceiptError naming the key."""
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        return _parse_object(kind, value, where, key)
    origin = get_origin(kind)
    if origin in (types.UnionType, Union):
        inner = next(option for option in get_args(kind) if option is not type(None))
        return None if value is None else _parse(inner, value, where, key)
    if origin is Literal:
        if value not in get_args(kind):
            allowed = ", ".join(get_args(kind))
            raise ReceiptError(f"{where}: {key} is {value!r}, expected one of {allowed}")
        return value
    expected = origin or kind
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ReceiptError(f"{where}: {key} is {value!r}, expected {expected.__name__}")
    return value


def _parse_object(kind: type, value: Any, where: str, key: str) -> Any:
    if not isinstance(value, dict):
        raise ReceiptError(f"{where}: {key} is {value!r}, expected an object")
    hints = get_type_hints(kind)
    prefix = f"{key}." if key else ""
    later = _LATER if kind is Receipt else ()
    missing = sorted(set(hints) - set(value) - set(later))
    unknown = sorted(set(value) - set(hints))
    if missing or unknown:
        what = [f"missing {', '.join(prefix + name for name in missing)}"] if missing else []
        what += [f"unknown {', '.join(prefix + name for name in unknown)}"] if unknown else []
        raise ReceiptError(f"{where}: keys {' and '.join(what)}")
    inner = {name: _parse(hints[name], value[name], where, prefix + name) for name in value}
    return kind(**inner)
