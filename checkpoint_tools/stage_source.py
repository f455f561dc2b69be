"""The checkpoint, stage config and receipt that a path stands for, opened for conversion."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.lineage import Ancestor, lineage
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.names import NameTable
from checkpoint_tools.published_folder import CONFIG_FILE
from checkpoint_tools.quantized_layout import Calibration
from checkpoint_tools.torch_dist import DistributedCheckpoint
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.infer.model import find_checkpoint
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import StageFolder
from megatron_vl.run.receipt import Receipt
from megatron_vl.train.checkpoint import LoopState, read_state
from megatron_vl.train.distill import AMAX_FILE


@dataclass(frozen=True)
class StageSource:
    """An opened checkpoint.

    Attributes:
        checkpoint: its tensors; they are exactly the model's.
        stage: the stage folder it lies in.
        receipt: the stage's, where it names this checkpoint; None otherwise.
        table: the name table of its model, publishing vocab_size rows.
    """

    checkpoint: DistributedCheckpoint
    state: LoopState
    config: StageConfig
    stage: StageFolder
    receipt: Receipt | None
    table: NameTable

    @cached_property
    def ancestors(self) -> list[Ancestor]:
        """The stages up to this one, oldest first."""
        return lineage(self.stage, self.config)

    @cached_property
    def digest(self) -> str:
        """The checkpoint's digest: as its receipt says, or else of its files, which are read."""
        if self.receipt is not None and self.receipt.checkpoint is not None:
            return self.receipt.checkpoint.digest
        return checkpoint_digest(self.checkpoint.folder)

    @cached_property
    def trained_amax(self) -> Path | None:
        """The calibration that a distillation trained this checkpoint under; None of any other."""
        path = self.stage.path / AMAX_FILE
        if path.is_file() and Calibration.read(path).digest == self.digest:
            return path
        return None

    def check_digest(self) -> None:
        """Raise ConversionError unless the files are those the receipt names; reads them all."""
        if self.receipt is None or self.receipt.checkpoint is None:
            return
        if checkpoint_digest(self.checkpoint.folder) != self.receipt.checkpoint.digest:
            raise ConversionError(
                f"{self.checkpoint.folder} is not what {self.stage.receipt_path} says: its files "
                "have changed since. Restore them, or run the stage again"
            )


def open_stage(path: Path) -> StageSource:
    """Open what `path` stands for: a run, a stage folder or a checkpoint (see `find_checkpoint`).

    Raises:
        ConversionError, RunError, ConfigError: it cannot be used.
        NamesError: its tensors are not its config's.
    """
    if (path / CONFIG_FILE).is_file():
        raise ConversionError(
            f"{path} is a published folder, and this needs a checkpoint: the one it was made of, "
            "or `mvl checkpoint import` makes one"
        )
    if not path.exists():
        raise ConversionError(f"{path} is not there; name a run, a stage folder or a checkpoint")
    folder, config_path = find_checkpoint(path)
    config = load_stage(config_path)
    checkpoint = DistributedCheckpoint(folder)
    table = name_table(config.model)
    table.check_stored({n: s.shape for n, s in checkpoint.tensors.items()}, str(folder))
    stage = StageFolder(config_path.parent, config.name)
    receipt = stage.receipt()
    if receipt is not None and not _names(stage, receipt, folder):
        receipt = None
    return StageSource(checkpoint, read_state(folder), config, stage, receipt, table)


def _names(stage: StageFolder, receipt: Receipt, folder: Path) -> bool:
    if receipt.checkpoint is None:
        return False
    return stage.checkpoint_path(receipt).resolve() == folder.resolve()
