"""The saves of one stage: what each holds, when it becomes valid, and what it cost the training.

`checkpoint_save.Saver` writes one checkpoint. This says what the loop's state is, writes the ledger
before it, ends a save once no rank writes any more, and journals it. All ranks call `begin` and
`end` at the same steps. Refuses to write for an attempt that another has taken over from.
"""

import time

import torch.distributed

from megatron_vl.config.schema import StageConfig
from megatron_vl.run.folder import RunFolder, StageFolder
from megatron_vl.train.checkpoint import LoopState, step_folder
from megatron_vl.train.checkpoint_save import Saved, Saver, longest_save
from megatron_vl.train.data_account import TrainingData
from megatron_vl.train.meters import Meters
from megatron_vl.train.start import Start


class Saves:
    """Begins and ends the saves of a stage on this rank.

    Args:
        start: how the stage started: what learns, and from which checkpoint.
        loader: whose cursor and ledger belong to each save.
        meters: where rank 0 says what a save took.

    Attributes:
        longest: seconds of the longest save, earlier attempts included; None when there was none.
        waited: seconds that this rank could not train because of saves.
    """

    def __init__(
        self,
        config: StageConfig,
        run: RunFolder,
        stage: StageFolder,
        start: Start,
        loader: TrainingData,
        meters: Meters,
    ) -> None:
        self.longest = longest_save(run, stage)
        self.waited = 0.0
        self._background = config.checkpoint.async_save
        self._trainable = sorted(part.value for part in config.train.trainable)
        self._run, self._stage, self._start = run, stage, start
        self._loader, self._meters = loader, meters
        self._attempt = 0
        self._saver = Saver(
            start.trainee,
            background=self._background,
            any_layout=config.checkpoint.any_layout,
        )

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a save is still being written."""
        return self._saver.writing

    def begin(self, step: int, *, optimizer: bool, attempt: int, last: bool = False) -> None:
        """Start the save of `step`; `end` makes it valid, at the latest before the next begins."""
        self.end()
        began = time.perf_counter()
        state = LoopState(
            stage=self._stage.name,
            step=step,
            data_cursor=self._loader.cursor,
            optimizer=optimizer,
            trainable=self._trainable,
            parent=self._start.parent.digest if self._start.parent else "",
        )
        self._stage.require_current(attempt)
        # First the ledger: a checkpoint must not outlive what it has seen. The other way round, a
        # line without its checkpoint is one that the next attempt writes again.
        self._loader.saved(step)
        self._saver.begin(step_folder(self._stage.checkpoints, step), state, last=last)
        self.waited += time.perf_counter() - began
        self._attempt = attempt
        if not self._background:
            self.end()

    def end(self) -> None:
        """Wait for the save that is under way, if one is, and journal it."""
        if self._saver.under_way is None:
            return
        began = time.perf_counter()
        saved = self._saver.end(lambda: self._stage.require_current(self._attempt))
        self.waited += time.perf_counter() - began
        self.longest = max(saved.seconds, self.longest or 0.0)
        if torch.distributed.get_rank() == 0:
            self._tell(saved)

    def _tell(self, saved: Saved) -> None:
        self._meters.say(
            f"saved {saved.folder.name} in {saved.seconds:.2f} s; training waited "
            f"{saved.stall_seconds:.2f} s of them"
        )
        self._run.journal.append(
            "saved",
            stage=self._stage.name,
            attempt=self._attempt,
            step=saved.state.step,
            seconds=saved.seconds,
            stall_s=saved.stall_seconds,
        )
