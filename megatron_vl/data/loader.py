"""Packs for the trainer, decoded ahead.

`PackLoader` reads a stage's blend, plans the packs (`plan.py`) and decodes this data-parallel
rank's share of each global batch in threads. Its whole state is `cursor`, the number of packs all
ranks have consumed: a loader opened at a cursor gives the same global batches, bit for bit, at any
number of ranks and threads, and decodes nothing of what came before.

A sample that cannot be decoded is replaced by the nearest shorter one of its source that can be,
the same on every rank and in every run; it is counted, reported, and fails the run where it is not
alone (`ledger.py`).

Threads, not processes: image decoding and resizing release the interpreter, and nothing forks under
a running process group. `held_out_examples` serves generation.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import PackOrder
from megatron_vl.cost.pack_cost import pack_cost
from megatron_vl.data.blend import shares_of
from megatron_vl.data.cost_order import deal
from megatron_vl.data.encode import encode_sample, load_tokenizer
from megatron_vl.data.fit import Room
from megatron_vl.data.ledger import BadDataError, BadSample, BadSamples, BatchRecord, digest_of
from megatron_vl.data.lengths import LengthTable, length_table
from megatron_vl.data.pack import Pack, make_pack
from megatron_vl.data.packing import PackLimits
from megatron_vl.data.plan import DataEndedError, PackPlan, PlannedSample, PlanSettings
from megatron_vl.data.plan_mark import read_mark, write_mark
from megatron_vl.data.store import SourceStore, open_sources
from megatron_vl.sequence.layout import Document

Decoded = tuple[str, Document, list[Tensor]]
"""A sample's key, its document and the pictures of its images."""

MOST_TRIES = 16
"""Shorter samples tried in place of one that cannot be decoded."""
_COUNTED_AHEAD = 200_000
"""Samples of a blend that ends, up to which its packs are counted before training starts."""


def plan_settings(config: StageConfig, split: str) -> PlanSettings:
    """How a stage's packs are planned; held-out packs come in random order."""
    data = config.data
    settings = PlanSettings(
        limits=PackLimits(data.sequence_length, data.max_tiles_per_pack, data.max_samples_per_pack),
        window=data.packing_window,
        seed=config.train.seed,
        batch=config.train.global_batch,
        packing=data.packing,
        packer=data.packer,
        spare_packs=data.spare_packs,
        alignment=data.document_alignment,
        when_source_ends=data.when_source_ends,
    )
    if data.order is PackOrder.random or split != "train":
        return settings
    cost = pack_cost(
        config.model,
        sequence_length=data.sequence_length,
        tile_size=data.tile_size,
        trainable={part.value for part in config.train.trainable},
    )
    return replace(
        settings,
        order=PackOrder.aligned,
        cost=cost,
        run=data.aligned_packs or config.train.global_batch,
    )


class PackLoader:
    """This rank's packs of each global batch.

    Args:
        split: train or val; epochs count for train alone.
        rank, size: of the data-parallel group.
        cursor: packs consumed so far, over all ranks.
        mark: file of `write_mark`; a loader far from the start opens sooner with it.
        report: is told of every sample that was replaced, by any thread.

    Attributes:
        cursor: packs consumed, over all ranks.
        dropped: samples of each source that fit no pack or could not be read beforehand.
        bad: what could not be decoded.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: train.global_batch is no multiple of size, the cursor no multiple of it, the
            blend names no such source, or holds too little for the stage.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        split: str,
        rank: int,
        size: int,
        cursor: int = 0,
        mark: Path | None = None,
        report: Callable[[BadSample], None] | None = None,
    ) -> None:
        assert 0 <= rank < size
        assert cursor >= 0
        data, batch = config.data, config.train.global_batch
        self._places = deal(batch, rank, size)
        if cursor % batch:
            raise ValueError(
                f"the data order is at pack {cursor}, which is no whole number of global batches "
                f"of {batch}: it was saved with another train.global_batch; set that one again, or "
                "start the stage anew"
            )
        self.cursor = cursor
        self._config, self._batch = config, batch
        self._tokenizer, self._room = load_tokenizer(config), Room.of(config)
        self._stores = open_sources(data.root, sorted(data.blend), split)
        self._tables = {
            source: length_table(store, self._tokenizer, self._room)
            for source, store in self._stores.items()
        }
        self.bad = BadSamples(data.max_bad_fraction)
        self._refuse_broken_tables()
        self._plan = PackPlan(
            {source: table.sizes for source, table in self._tables.items()},
            shares_of(
                data,
                {source: table.mean_length for source, table in self._tables.items()},
                endless=split != "train",
            ),
            plan_settings(config, split),
        )
        self.dropped = self._plan.left_out
        self._report = report
        self._fingerprint = ""
        if mark is not None:
            self._read_mark(mark)
        if split == "train":
            self._refuse_too_little()
        self._ahead = data.prefetch
        self._next_cursor = cursor
        self._waiting: deque[list[Future[Pack]]] = deque()
        self._ended: DataEndedError | None = None
        self._workers = ThreadPoolExecutor(data.workers, thread_name_prefix="packs")
        self._fill()

    def _refuse_broken_tables(self) -> None:
        """Rows that could not be read count as samples that cannot be decoded."""
        most = self._config.data.max_bad_fraction
        for source, table in self._tables.items():
            if table.bad > most * max(len(table), 1 / max(most, 1e-9)):
                raise ValueError(
                    f"{table.bad} of {len(table)} samples of source {source} cannot be read, more "
                    f"than data.max_bad_fraction {most}; the first: {table.errors[0]}"
                )

    def _read_mark(self, path: Path) -> None:
        try:
            text = path.read_text(encoding="utf-8")
        except OSError:
            return
        mark = read_mark(text, self.fingerprint)
        if mark is not None:
            self._plan.remember(mark)

    def _refuse_too_little(self) -> None:
        """A blend that ends too soon is refused at the start where that can be told."""
        wanted = self._config.train.steps * self._batch
        there = self._plan.total_samples
        if there < wanted:
            raise ValueError(self._too_little(f"at most {int(there)} packs"))
        if there <= _COUNTED_AHEAD:
            packs = sum(len(table) for table in self._plan.rounds())
            if packs < wanted:
                raise ValueError(self._too_little(f"{packs} packs"))

    def _too_little(self, packs: str) -> str:
        steps = self._config.train.steps
        return (
            f"data.epochs lets the blend give {packs}, train.steps {steps} x train.global_batch "
            f"{self._batch} ask for {steps * self._batch}; raise data.epochs, leave sources out of "
            "it (they never end), set data.when_source_ends: go_on, or lower train.steps"
        )

    @property
    def fingerprint(self) -> str:
        """Changes with everything that the data order depends on."""
        self._fingerprint = self._fingerprint or self._plan.fingerprint()
        return self._fingerprint

    def mark(self) -> str:
        """The text of a mark at the cursor."""
        return write_mark(self._plan.mark(self.cursor), self.fingerprint)

    def batch_record(self, first_pack: int) -> BatchRecord:
        """What the global batch that starts at a pack holds, over all ranks, as planned."""
        packs = self._plan.packs(first_pack, first_pack + self._batch)
        samples = [sample for pack in packs for sample in pack]
        sources: dict[str, int] = {}
        for sample in samples:
            sources[sample.source] = sources.get(sample.source, 0) + 1
        return BatchRecord(
            packs=(first_pack, first_pack + self._batch),
            samples=len(samples),
            tokens=sum(sample.length for sample in samples),
            ids=digest_of(self.identify(sample) for sample in samples),
            sources=sources,
        )

    def planned(self, number: int) -> tuple[PlannedSample, ...]:
        """The samples of a pack."""
        return self._plan[number]

    def identify(self, sample: PlannedSample) -> tuple[str, str, int]:
        """Source, key and epoch of a planned sample."""
        return sample.source, self._tables[sample.source].key(sample.index), sample.epoch

    def _fill(self) -> None:
        """Hand the threads as many global batches as are to be decoded ahead."""
        while len(self._waiting) < self._ahead and self._ended is None:
            try:
                self._submit()
            except DataEndedError as ended:
                self._ended = ended  # it matters once what is there is used up

    def _submit(self) -> None:
        """Hand the threads this rank's packs of the next global batch."""
        batch = self._plan.packs(self._next_cursor, self._next_cursor + self._batch)
        self._waiting.append(
            [
                self._workers.submit(self._decode_pack, self._next_cursor + place, batch[place])
                for place in self._places
            ]
        )
        self._next_cursor += self._batch

    def next_batch(self) -> list[Pack]:
        """This rank's packs of the next global batch, in the order of `deal`.

        Raises:
            BadDataError: too many samples cannot be decoded; the message names the first.
            DataEndedError: the blend has no further global batch.
        """
        if not self._waiting:
            if self._ended is None:
                try:
                    self._submit()
                except DataEndedError as ended:
                    self._ended = ended
            if self._ended is not None:
                step = self.cursor // self._batch
                raise DataEndedError(f"{self._ended}, in step {step + 1}") from self._ended
        packs = [future.result() for future in self._waiting[0]]
        self._waiting.popleft()
        self.cursor += self._batch
        self._fill()
        return packs

    def _decode_pack(self, number: int, members: Sequence[PlannedSample]) -> Pack:
        documents: list[Document] = []
        tiles: list[Tensor] = []
        keys: list[str] = []
        for member in members:
            key, document, images = self._decode_or_replace(number, member)
            keys.append(key)
            documents.append(document)
            tiles += images
        return make_pack(
            documents,
            tiles,
            keys,
            length=self._room.sequence_length,
            patch_size=self._room.patch_size,
            pad_token=self._tokenizer.pad_id,
            alignment=self._config.data.document_alignment,
            sources=[member.source for member in members],
        )

    def _decode_or_replace(self, number: int, member: PlannedSample) -> Decoded:
        """A sample, or the nearest shorter one of its source that can be decoded."""
        table, source = self._tables[member.source], member.source
        try:
            return self._decode(source, member.index)
        except Exception as error:  # whatever broken media make a decoder do
            first, key = error, table.key(member.index)
            self.bad.bad(source, key, error)
        for index in shorter_samples(table, member):
            try:
                found = self._decode(source, index)
            except Exception as error:
                self.bad.bad(source, table.key(index), error)
                continue
            if self._report is not None:
                self._report(BadSample(source, key, member.epoch, number, found[0], str(first)))
            return found
        raise BadDataError(
            f"sample {key} of source {source} cannot be decoded: {first}; nor can any of the "
            f"{MOST_TRIES} nearest shorter ones of its source"
        ) from first

    def _decode(self, source: str, index: int) -> Decoded:
        fitted = self._tables[source].fitted(index)
        document, tiles = encode_sample(self._stores[source], fitted, self._tokenizer, self._room)
        self.bad.good(source)
        return fitted.key, document, tiles

    def close(self) -> None:
        """Stop the threads and close the sources; the loader cannot be used afterwards."""
        self._workers.shutdown(wait=True, cancel_futures=True)
        self._waiting.clear()
        for store in self._stores.values():
            store.close()


def shorter_samples(table: LengthTable, member: PlannedSample) -> list[int]:
    """The samples of a source that fit where one stands, longest first, the next in the table
    before others of equal length; at most `MOST_TRIES`."""
    lengths_N = np.asarray(table.columns["length"])
    fits_N = (lengths_N > 0) & (lengths_N <= member.length)
    fits_N &= np.asarray(table.columns["tiles"]) <= member.tiles
    fits_N[member.index] = False
    found: list[int] = []
    for _ in range(MOST_TRIES):
        candidates = np.flatnonzero(fits_N)
        if len(candidates) == 0 or len(found) >= MOST_TRIES:
            break
        longest = candidates[lengths_N[candidates] == lengths_N[candidates].max()]
        after = np.argsort((longest - member.index) % len(table), kind="stable")
        found += longest[after].tolist()
        fits_N[longest] = False
    return found[:MOST_TRIES]


def held_out_examples(
    config: StageConfig, source: str, n: int
) -> list[tuple[list[dict[str, Any]], list[bytes]]]:
    """The first n held-out conversations of a source, each with its encoded media.

    Raises:
        FileNotFoundError: the data was not prepared.
        ValueError: no such source.
    """
    store = SourceStore(config.data.root, source, "val")
    samples = [store.sample(key) for key in store.keys[:n]]
    examples = [(sample.messages, sample.media()) for sample in samples]
    store.close()
    return examples
