"""The training packs of a stage, and the account of them in the stage's folder.

    data.jsonl               the ledger: every global batch used, written by rank 0
    plan_mark.json           where the data order stood at the last save, so that a run far into a
                             large plan goes on at once; losing it costs time alone
    bad_samples.RANK.jsonl   samples that could not be decoded, by data-parallel rank; no file where
                             there were none

See `data/ledger.py` for what the ledger guarantees.
"""

from collections.abc import Callable

import torch.distributed
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.ledger import BadSample, Ledger, write_bad
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.run import atomic
from megatron_vl.run.folder import StageFolder


class TrainingData:
    """Hands out packs as `PackLoader` does and writes down what was used.

    Args:
        step, cursor: where the stage stands.
        say: takes a line for the log.

    Raises:
        ValueError: see `PackLoader` and `Ledger.opened`.
    """

    def __init__(
        self,
        config: StageConfig,
        stage: StageFolder,
        groups: ProcessGroupCollection,
        *,
        step: int,
        cursor: int,
        say: Callable[[str], None],
    ) -> None:
        self._stage, self._say, self._data = stage, say, config.data
        self._batch = config.train.global_batch
        self._rank = groups.dp.rank()
        # The ranks of one replica read the same packs; the first of them reports.
        self._reports = groups.tp.rank() == groups.pp.rank() == groups.cp.rank() == 0
        self._mark = stage.path / "plan_mark.json"
        self._loader = PackLoader(
            config,
            split="train",
            rank=self._rank,
            size=groups.dp.size(),
            cursor=cursor,
            mark=self._mark,
            report=self._report,
        )
        self._used_tokens = self._used_packs = 0
        self._units = self._pruned = 0
        self._ledger: Ledger | None = None
        if torch.distributed.get_rank() == 0:
            self._ledger = Ledger(stage.path / "data.jsonl")
            self._ledger.opened(step=step, cursor=cursor, plan=self._loader.fingerprint)
        for source, count in self._loader.dropped.items():
            if count:
                say(f"{count} samples of {source} fit no pack or cannot be read, and are left out")

    @property
    def cursor(self) -> int:
        """Packs consumed, over all ranks."""
        return self._loader.cursor

    def next_batch(self) -> list[Pack]:
        """See `PackLoader.next_batch`."""
        packs = self._loader.next_batch()
        self._units += sum(len(pack.grids) for pack in packs)
        self._pruned += sum(len(pack.videos) for pack in packs)
        return packs

    def used(self, step: int) -> None:
        """The batch handed out last has been trained on, in `step`."""
        if self._ledger is None:
            return
        record = self._loader.batch_record(self.cursor - self._batch)
        self._ledger.step(step, record)
        self._used_tokens += record.tokens
        self._used_packs += self._batch

    def saved(self, step: int) -> None:
        """The weights after `step` are on disk."""
        if self._ledger is not None:
            self._ledger.saved(step)
            atomic.write_text(self._mark, self._loader.mark())

    def facts(self) -> dict[str, object]:
        """What the receipt says of the data; rank 0 knows it.

        `data/fill` is the filled part of this attempt's packs; `data/bad`, `data/units` (tiles,
        frames and whole images) and `data/pruned_videos` are this rank's.
        """
        assert self._ledger is not None
        room = self._used_packs * self._data.sequence_length
        return {
            "data/plan": self._loader.fingerprint,
            "data/packer": self._data.packer.name if self._data.packing else "none",
            "data/order": self._data.order.name,
            "data/fill": self._used_tokens / room if room else None,
            "data/samples": self._ledger.samples,
            "data/units": self._units,
            "data/pruned_videos": self._pruned,
            "data/left_out": sum(self._loader.dropped.values()),
            "data/bad": sum(self._loader.bad.counts.values()),
        }

    def close(self) -> None:
        """Stop the threads and close the sources."""
        self._loader.close()

    def _report(self, bad: BadSample) -> None:
        if not self._reports:
            return
        write_bad(self._stage.path / f"bad_samples.{self._rank}.jsonl", bad)
        self._say(
            f"sample {bad.key} of {bad.source} cannot be decoded ({bad.error}); "
            f"{bad.instead} stands in its place"
        )
