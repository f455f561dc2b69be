"""What each kind of node runs, and what it leaves: `mvl checkpoint assemble`, `mvl evaluate`,
`mvl checkpoint release`.

A node that is run again after it was cut off finds its own leavings and goes on or replaces them;
it never takes the leavings of another configuration for its own, because the commands themselves
compare what they find.
"""

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint_tools.certificate.check import CERTIFICATE_FILE
from launch import exit_codes
from launch.nodes.certificates import asked_otherwise, failed_checks
from launch.nodes.errors import CertificateError, NodeError
from megatron_vl.config.load_node import load_node
from megatron_vl.config.schema_node import AssembleNode, EvaluateNode, ReleaseNode
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.run.receipt import CheckpointRef

METRICS = "metrics.json"
_ASSEMBLED = "assembled"
Child = Callable[[Sequence[str]], None]
"""Runs one command to its end; raises where it fails."""


@dataclass(frozen=True)
class Place:
    """Where a node works."""

    run: RunFolder
    stage: StageFolder
    attempt: int

    def checkpoint(self, source: StageFolder) -> Path:
        """The checkpoint of a stage that is done."""
        receipt = source.receipt()
        assert receipt is not None
        return source.checkpoint_path(receipt).resolve()

    def checkpoint_digest(self, source: StageFolder) -> str:
        """The digest of that checkpoint, as the receipt states it."""
        receipt = source.receipt()
        assert receipt is not None
        assert receipt.checkpoint is not None
        return receipt.checkpoint.digest


@dataclass(frozen=True)
class Made:
    """What a node has left, for its receipt."""

    said: str = ""
    checkpoint: CheckpointRef | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    outputs: dict[str, str] = field(default_factory=dict)


def do(place: Place, run_child: Child) -> Made:
    """Do what the node of a place says. Raises NodeError."""
    node = load_node(place.stage.node_path)
    if isinstance(node, AssembleNode):
        return _assemble(node, place, run_child)
    if isinstance(node, EvaluateNode):
        return _evaluate(node, place, run_child)
    return _release(node, place, run_child)


def _mvl(*words: str) -> list[str]:
    """A command of the code that runs now: in a job its snapshot, whatever the folder holds."""
    return [sys.executable, *["-P"] * sys.flags.safe_path, "-m", "launch.cli", *words]


def _assemble(node: AssembleNode, place: Place, run_child: Child) -> Made:
    """Put the weights together beside the stage's own files, then move them there."""
    stage = place.stage
    made = (stage.path / _ASSEMBLED).resolve()
    if not made.is_dir() and not stage.checkpoints.is_dir():
        run_child(
            _mvl(
                "checkpoint", "assemble", "--decoder", node.decoder, "--encoder", node.encoder,
                str(made), "--like", str(stage.config_path),
            )
        )  # fmt: skip
    if made.is_dir():
        # The checkpoint last: where it is, the rest is too.
        for name in ("tokenizer", "origin.json", "checkpoints"):
            if (made / name).exists():
                (made / name).replace(stage.path / name)
        shutil.rmtree(made)
    found = sorted(stage.checkpoints.glob("step_*"))
    if len(found) != 1:
        raise NodeError(f"{stage.checkpoints} holds {len(found)} checkpoints, expected one")
    saved = CheckpointRef(str(found[0].relative_to(stage.path)), checkpoint_digest(found[0]))
    names = f"{Path(node.decoder).name} and {Path(node.encoder).name}"
    return Made(said=f"assembled of {names}", checkpoint=saved)


def _evaluate(node: EvaluateNode, place: Place, run_child: Child) -> Made:
    """Measure the parent's checkpoint."""
    (source,) = place.run.sources(place.stage).values()
    out = place.stage.path / METRICS
    out.unlink(missing_ok=True)
    words = [str(place.checkpoint(source)), *node.suites]
    words += ["--command", node.command] if node.command else []
    run_child(_mvl("evaluate", *words, "--out", str(out.resolve()), *node.arguments))
    metrics = _read_metrics(out)
    said = f"measured {len(metrics)} metrics of {source.name}"
    return Made(said=said, metrics=metrics, outputs=_file(place, out))


def _read_metrics(path: Path) -> dict[str, Any]:
    """The flat object of numbers in a metrics file. Raises NodeError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NodeError(f"the evaluation left no {path.name}") from None
    except ValueError as error:
        raise NodeError(f"{path.name} of the evaluation is no JSON: {error}") from error
    numbers = isinstance(found, dict) and all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in found.values()
    )
    if not numbers or not found:
        raise NodeError(f"{path.name} of the evaluation is no object of numbers")
    return found


def _release(node: ReleaseNode, place: Place, run_child: Child) -> Made:
    """Export every format, certified. What is there of the same weights stays as it is."""
    out = place.run.path.resolve() / node.name
    words = [str(out)]
    for form, source in place.run.sources(place.stage).items():
        words += [f"--{form}", str(place.checkpoint(source))]
        _drop_other(out / form, place.checkpoint_digest(source), node.arguments)
    try:
        run_child(_mvl("checkpoint", "release", *words, *node.arguments))
    except NodeError as error:
        if error.status != exit_codes.FOUND:
            raise
        raise CertificateError(failed_checks(out, list(node.formats))) from None
    metrics: dict[str, Any] = {}
    outputs: dict[str, str] = {}
    for form in node.formats:
        certificate = out / form / CERTIFICATE_FILE
        made = _certificate(certificate)
        if not made["passed"]:
            raise NodeError(f"{certificate} says that it did not pass")
        metrics |= {
            f"{form}.{check['name']}": check["measured"]
            for check in made["checks"]
            if isinstance(check["measured"], int | float)
            and not isinstance(check["measured"], bool)
        }
        metrics[f"{form}.checks"] = len(made["checks"])
        outputs[f"{node.name}/{form}"] = checkpoint_digest(out / form)
        outputs |= _file(place, certificate)
    said = f"released and certified {', '.join(node.formats)}"
    return Made(said=said, metrics=metrics, outputs=outputs)


def _drop_other(folder: Path, digest: str, arguments: Sequence[str]) -> None:
    """Remove an earlier release made of another checkpoint, or held to other bounds, than now."""
    if not (folder / CERTIFICATE_FILE).is_file():
        return
    made = _certificate(folder / CERTIFICATE_FILE)
    if made["checkpoint"]["digest"] != digest or asked_otherwise(made, arguments):
        shutil.rmtree(folder)


def _certificate(path: Path) -> dict[str, Any]:
    """A certificate. Raises NodeError when there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError) as error:
        raise NodeError(f"{path} is no certificate: {error}") from error


def _file(place: Place, path: Path) -> dict[str, str]:
    """A file by its path from the run folder, with its SHA-256."""
    name = path.resolve().relative_to(place.run.path.resolve()).as_posix()
    return {name: hashlib.sha256(path.read_bytes()).hexdigest()}
