"""A run on disk: where each thing lies, and who may start from whom.

    runs/NAME/plan.yaml                      what was asked for: stages, sources, overrides, site
    runs/NAME/journal.jsonl                  what happened, event by event
    runs/NAME/stages/NN_name/config.yaml     the resolved configuration
    runs/NAME/stages/NN_name/attempts/N/     log (rank 0), rank_R.log, config.yaml, an older receipt
    runs/NAME/stages/NN_name/checkpoints/    written by the trainer
    runs/NAME/stages/NN_name/metrics.jsonl   every step of all attempts
    runs/NAME/stages/NN_name/tensorboard/
    runs/NAME/stages/NN_name/receipt.json    how the stage ended

Everything inside is relative to the run folder, so that a run can be moved. Refuses a folder
without a plan, and any start from a parent that is not done or no longer what its receipt says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from megatron_vl.run import atomic
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.journal import Journal
from megatron_vl.run.receipt import Receipt, Seconds, read_receipt, write_receipt


class RunError(ValueError):
    """A run folder that is not what was asked for."""


class ParentError(RunError):
    """A stage must not start: its parent is missing, not done, or has changed since it was."""


@dataclass(frozen=True)
class StageFolder:
    """One stage of a run."""

    path: Path
    name: str

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

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

        `plan["stages"]` lists `{"name", "folder", ...}` in the order they run.
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
            return yaml.safe_load(self.plan_path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise RunError(f"{self.path}: not a run folder (it has no plan.yaml)") from None

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

    def parent(self, stage: StageFolder) -> StageFolder | None:
        """The stage before this one; None for the first."""
        stages = self.stages()
        index = [other.name for other in stages].index(stage.name)
        return stages[index - 1] if index else None


def require_done_parent(
    run: RunFolder,
    stage: StageFolder,
    *,
    digest: Callable[[Path], str] | None = checkpoint_digest,
) -> Receipt:
    """The receipt of a stage's parent, if the stage may start from it. Raises ParentError if not.

    `digest` recomputes the digest of the parent's checkpoint, which costs a read of all of it; None
    leaves that out (the supervisor has checked, the ranks need not read it again).
    """
    parent = run.parent(stage)
    if parent is None:
        raise ParentError(f"{stage.name} is the first stage of {run.path} and has no parent")
    receipt = parent.receipt()
    again = f"run it first: mvl submit RECIPE --run {run.path} --from {parent.name}"
    if receipt is None:
        raise ParentError(
            f"{stage.name} needs the checkpoint of {parent.name}, which has no receipt; {again}"
        )
    if not receipt.done:
        raise ParentError(
            f"{stage.name} needs {parent.name} done, but it is {receipt.status}: "
            f"{receipt.reason}; {again}"
        )
    assert receipt.checkpoint is not None
    if digest is not None:
        _check_digest(stage, parent, receipt, digest)
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
