"""A run on disk: where each thing lies, and who may start from whom.

    runs/NAME/plan.yaml                      what was asked for: stages, sources, overrides, site
    runs/NAME/journal.jsonl                  what happened, event by event
    runs/NAME/stages/NN_name/config.yaml     the resolved configuration
    runs/NAME/stages/NN_name/attempts/N/     log (rank 0), rank_R.log, config.yaml, an older receipt
    runs/NAME/stages/NN_name/checkpoints/    written by the trainer
    runs/NAME/stages/NN_name/metrics.jsonl   every step of all attempts
    runs/NAME/stages/NN_name/tensorboard/
    runs/NAME/stages/NN_name/receipt.json    how the stage ended
    runs/NAME/stages/NN_name/node.yaml       of a node that does not train: what it does
    runs/NAME/release/                       what a release node wrote, by its name

Everything inside is relative to the run folder, so that a run can be moved. Refuses a folder
without a plan, and any start from a parent that is not done or no longer what its receipt says.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vl.config.read_yaml import Loader
from megatron_vl.run import atomic
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.graph import Graph
from megatron_vl.run.journal import Journal
from megatron_vl.run.receipt import (
    WITH_CHECKPOINT,
    Receipt,
    Seconds,
    read_receipt,
    write_receipt,
)

_NEAR = 3


class RunError(ValueError):
    """A run folder that is not what was asked for."""


class ParentError(RunError):
    """A stage must not start: its parent is missing, not done, or has changed since it was."""


class NotTakenError(ParentError):
    """A stage that a gate's verdict has left out: the chain has taken another branch."""


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run."""

    path: Path
    name: str

    @property
    def config_path(self) -> Path:
        """The resolved configuration of a training stage, or the one a node's checkpoint has."""
        return self.path / "config.yaml"

    @property
    def node_path(self) -> Path:
        """What a node does; a training stage has no such file."""
        return self.path / "node.yaml"

    @property
    def work_path(self) -> Path:
        """The file that says what the stage or node does."""
        return self.node_path if self.node_path.is_file() else self.config_path

    @property
    def checkpoints(self) -> Path:
        """The folder that holds the stage's checkpoints."""
        return self.path / "checkpoints"

    @property
    def metrics_path(self) -> Path:
        """The measurements, see `run.metrics`."""
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        """The folder of TensorBoard event files."""
        return self.path / "tensorboard"

    @property
    def receipt_path(self) -> Path:
        """The receipt, which exists once an attempt has ended."""
        return self.path / "receipt.json"

    def receipt(self) -> Receipt | None:
        """How the stage ended; None while no attempt has. Raises ReceiptError for a broken one."""
        try:
            return read_receipt(self.receipt_path)
        except FileNotFoundError:
            return None

    def write_receipt(self, receipt: Receipt) -> None:
        """Write the receipt, atomically."""
        assert receipt.stage == self.name, (receipt.stage, self.name)
        write_receipt(self.receipt_path, receipt)

    def attempt_path(self, number: int) -> Path:
        """The folder of one attempt; the first is 1."""
        return self.path / "attempts" / str(number)

    def last_attempt(self) -> int:
        """The number of the latest attempt; 0 when none was made."""
        folder = self.path / "attempts"
        found = [int(path.name) for path in folder.glob("*") if path.name.isdigit()]
        return max(found, default=0)

    def seconds_before(self, attempt: int) -> Seconds:
        """The wall time that the attempts before this one took, as the last of them wrote it."""
        try:
            return read_receipt(self.attempt_path(attempt - 1) / "receipt.json").seconds
        except FileNotFoundError:
            return Seconds()

    def start_attempt(self) -> int:
        """Make the folder of the next attempt and return its number.

        The receipt of an earlier attempt moves into that attempt's folder: while an attempt runs,
        the stage has no receipt, and whatever receipt appears is this attempt's own.
        """
        earlier, number = self.receipt(), self.last_attempt() + 1
        if earlier is not None:
            self.receipt_path.replace(self.attempt_path(number - 1) / "receipt.json")
        self.attempt_path(number).mkdir(parents=True)
        return number

    def require_current(self, attempt: int) -> None:
        """Refuse to write on behalf of an attempt that a later one has taken over from.

        A node that lost touch with Slurm may still run ranks while their job runs elsewhere.
        Raises RunError.
        """
        latest = self.last_attempt()
        if latest > attempt:
            raise RunError(
                f"{self.path}: attempt {latest} has begun, so attempt {attempt} writes no more"
            )

    def checkpoint_path(self, receipt: Receipt) -> Path:
        """The checkpoint a receipt of this stage names. Raises RunError when it names none."""
        if receipt.checkpoint is None:
            raise RunError(f"{self.receipt_path}: names no checkpoint")
        return self.path / receipt.checkpoint.path


class RunFolder:
    """One run; cheap to make, reads the disk when asked."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.journal = Journal(self.path / "journal.jsonl")
        self._plan: tuple[str, dict[str, Any]] = ("", {})

    @property
    def name(self) -> str:
        """The run's name: that of its folder."""
        return self.path.resolve().name

    @property
    def plan_path(self) -> Path:
        """The plan, which makes a folder a run."""
        return self.path / "plan.yaml"

    def create(self, plan: dict[str, Any]) -> None:
        """Write the plan and make the stage folders; an earlier plan of the same run is replaced.

        `plan["stages"]` lists `{"name", "folder", ...}` in the order they run. An entry's `after`
        names what it waits for, its parent first (without the key: the entry before it), its `kind`
        what it is (`train` without the key), its `takes` the stages of a release by format.
        """
        names = [entry["name"] for entry in plan["stages"]]
        assert len(set(names)) == len(names), names
        for entry in plan["stages"]:
            (self.path / "stages" / entry["folder"]).mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(plan, sort_keys=False, allow_unicode=True, width=100)
        atomic.write_text(self.plan_path, text)

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.plan_path.is_file()

    def plan(self) -> dict[str, Any]:
        """The plan. Raises RunError when there is none."""
        try:
            text = self.plan_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise RunError(f"{self.path}: {self._why_none()}") from None
        if text != self._plan[0]:
            self._plan = (text, yaml.load(text, Loader=Loader))
        return self._plan[1]

    def _why_none(self) -> str:
        """Why there is no run here, and which runs are near."""
        why = "not a run folder (it has no plan.yaml)" if self.path.is_dir() else "no such folder"
        place = self.path if self.path.is_dir() else self.path.parent
        runs = sorted(str(plan.parent) for plan in place.glob("*/plan.yaml"))
        near = difflib.get_close_matches(str(self.path), runs, _NEAR, 0.0)
        return f"{why}; runs near it are {', '.join(near)}" if near else why

    def stages(self) -> list[StageFolder]:
        """The stages in the order they run; those the plan marks `skipped` are left out."""
        return [
            StageFolder(self.path / "stages" / entry["folder"], entry["name"])
            for entry in self.plan()["stages"]
            if not entry.get("skipped", False)
        ]

    def stage(self, name: str) -> StageFolder:
        """One stage by its name or its folder's name. Raises RunError when there is none."""
        stages = self.stages()
        for stage in stages:
            if name in (stage.name, stage.path.name):
                return stage
        known = ", ".join(stage.name for stage in stages)
        raise RunError(f"{self.path}: has no stage {name!r}; its stages are {known}")

    def graph(self) -> Graph:
        """Which stage follows which; a skipped one's children follow its parents."""
        entries = self.plan()["stages"]
        skipped = [entry["name"] for entry in entries if entry.get("skipped", False)]
        return _graph(entries).without(skipped)

    def waits_for(self, stage: StageFolder) -> list[StageFolder]:
        """The stages that must be done before this one starts, its parent first."""
        return [self.stage(name) for name in self.graph().parents[stage.name]]

    def parent(self, stage: StageFolder) -> StageFolder | None:
        """The stage whose checkpoint this one takes; None for the head.

        An evaluation or a release between the two passes the checkpoint on.
        """
        before = self.graph().parents[stage.name]
        return self.source(before[0]) if before else None

    def sources(self, stage: StageFolder) -> dict[str, StageFolder]:
        """The stages whose checkpoints a stage takes: by format for a release, else its parent."""
        entry = next(e for e in self.plan()["stages"] if e["name"] == stage.name)
        if "takes" in entry:
            return {form: self.source(name) for form, name in entry["takes"].items()}
        parent = self.parent(stage)
        return {} if parent is None else {"": parent}

    def source(self, name: str) -> StageFolder:
        """The stage whose checkpoint a name stands for: itself, unless it is skipped or makes none.

        Raises RunError when no stage before it makes one either.
        """
        entries = self.plan()["stages"]
        parents, asked = _graph(entries).parents, name
        by_name = {entry["name"]: entry for entry in entries}
        while by_name[name].get("skipped", False) or not _has_checkpoint(by_name[name]):
            if not parents[name]:
                raise RunError(f"{self.path}: no stage up to {asked} makes a checkpoint")
            name = parents[name][0]
        return self.stage(name)

    def not_taken(self, name: str) -> str | None:
        """Why a gate before a stage has left it out; None while it may still run."""
        graph = self.graph()
        for before in graph.parents[name]:
            receipt = self.stage(before).receipt()
            if receipt is not None and name in receipt.gate.get("closed", []):
                taken = ", ".join(receipt.gate["open"]) or "nothing"
                return f"not taken: the gate of {before} has gone on to {taken}"
            earlier = self.not_taken(before)
            if earlier is not None:
                return earlier
        return None


def _graph(entries: list[dict[str, Any]]) -> Graph:
    """The graph of a plan's entries; those without `after` follow the entry before them."""
    parents: dict[str, tuple[str, ...]] = {}
    before: tuple[str, ...] = ()
    for entry in entries:
        parents[entry["name"]] = tuple(entry.get("after", before))
        before = (entry["name"],)
    return Graph(parents)


def _has_checkpoint(entry: dict[str, Any]) -> bool:
    return entry.get("kind", "train") in WITH_CHECKPOINT


def require_done_parent(
    run: RunFolder,
    stage: StageFolder,
    *,
    digest: Callable[[Path], str] | None = checkpoint_digest,
) -> Receipt:
    """The receipt of a stage's parent, if the stage may start from it. Raises ParentError if not.

    Everything the stage waits for must be done, gates included. `digest` recomputes the digest of
    the checkpoints it takes, which costs a read of all of them; None leaves that out (the
    supervisor has checked, the ranks need not read them again).
    """
    sources = list(run.sources(stage).values())
    if not sources:
        raise ParentError(f"{stage.name} is the first stage of {run.path} and has no parent")
    left_out = run.not_taken(stage.name)
    if left_out is not None:
        raise NotTakenError(f"{stage.name} is {left_out}")
    receipts = {
        before.name: _done_receipt(run, stage, before)
        for before in [*run.waits_for(stage), *sources]
    }
    for parent in {source.path: source for source in sources}.values():
        receipt = receipts[parent.name]
        if digest is not None and receipt.checkpoint is not None:
            _check_digest(stage, parent, receipt, digest)
    return receipts[sources[0].name]


def _done_receipt(run: RunFolder, stage: StageFolder, before: StageFolder) -> Receipt:
    receipt = before.receipt()
    again = f"run it first: mvl submit RECIPE --run {run.path} --from {before.name}"
    if receipt is None:
        if not run.graph().parents[before.name]:
            again += f"; of published weights: mvl checkpoint import HF {before.path} --like FILE"
        raise ParentError(
            f"{stage.name} needs the checkpoint of {before.name}, which has no receipt; {again}"
        )
    if receipt.held_by_gate:
        raise ParentError(
            f"{stage.name} waits for {before.name}, whose gate holds: {receipt.reason}"
        )
    if not receipt.done:
        raise ParentError(
            f"{stage.name} needs {before.name} done, but it is {receipt.status}: "
            f"{receipt.reason}; {again}"
        )
    return receipt


def _check_digest(
    stage: StageFolder, parent: StageFolder, receipt: Receipt, digest: Callable[[Path], str]
) -> None:
    assert receipt.checkpoint is not None
    path = parent.checkpoint_path(receipt)
    try:
        found = digest(path)
    except ValueError as error:
        raise ParentError(f"{stage.name} needs the checkpoint of {parent.name}: {error}") from error
    if found != receipt.checkpoint.digest:
        raise ParentError(
            f"{stage.name} must not start from {path}: its digest is {found[:12]}..., the receipt "
            f"of {parent.name} says {receipt.checkpoint.digest[:12]}...; the files have changed "
            f"since. Restore them, or run {parent.name} again"
        )
