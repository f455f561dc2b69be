"""The order of training: which samples go into which pack, and which packs into which step.

A pure function of the samples' lengths and tiles, the data section, the global batch, the seed and
the cost of a pack. Packs have numbers, and the number of the next pack is the whole state of the
data order: any rank of any layout that asks for pack n gets the same one.

Planning goes window by window, as packs are asked for. The packer looks at one window of the stream
(`blend.py`) at a time; packs that stay too empty give their samples back to the next windows, a
bounded number of times. Packs are collected into rounds of `ROUND_BATCHES` global batches or more
and ordered there (`cost_order.py`); what does not fill a global batch waits for the next round.

Every sample of every epoch is in exactly one pack. Cost: about 3 microseconds a sample, memory for
a few rounds. A plan opened far from its start plans all that comes before, unless it is given a
mark: the state between two rounds.
"""

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema_data import Packer, PackOrder, SourceEnd
from megatron_vl.cost.pack_cost import PackCost
from megatron_vl.data.blend import Drawn, SampleStream, Share, SourceTable
from megatron_vl.data.cost_order import aligned_order, shuffled_order
from megatron_vl.data.pack_table import PackTable
from megatron_vl.data.packing import PackLimits, pack
from megatron_vl.data.plan_mark import NOBODY, NONE, Mark

FULL_ENOUGH = 0.98
"""Packs filled less, in tokens, tiles and samples, give their samples back."""
MOST_WAITS = 2
"""Windows a sample may be given back to."""
ROUND_BATCHES = 16
"""Global batches that are ordered together, at least."""
KEPT_ROUNDS = 4
KEPT_MARKS = 256
"""Marks are kept of every round, then of every other, every fourth ..., never more than this."""


class DataEndedError(ValueError):
    """A pack was asked for beyond the last: every source has given its epochs."""


@dataclass(frozen=True)
class PlanSettings:
    """What a plan depends on besides the samples and their shares.

    batch: packs of one global batch. alignment: lengths are rounded up to a multiple of it.
    cost: of a pack; None leaves the order random. run: packs in a row that cost about the same.
    """

    limits: PackLimits
    window: int
    seed: int
    batch: int = 1
    packing: bool = True
    packer: Packer = Packer.best_fit
    spare_packs: float = 0.0
    alignment: int = 1
    order: PackOrder = PackOrder.random
    cost: PackCost | None = None
    run: int = 1
    when_source_ends: SourceEnd = SourceEnd.go_on


@dataclass(frozen=True)
class PlannedSample:
    """One sample in a pack: its place in its source's table. [; ; ; tokens; tiles]"""

    source: str
    index: int
    epoch: int
    length: int
    tiles: int


class PackPlan:
    """The list of packs. `plan[n]` is the n-th pack: a tuple of samples.

    Args:
        tables: every source's lengths and tiles, by name.
        shares: of the same sources.

    Attributes:
        left_out: samples of each source that fit no pack.

    Raises:
        ValueError: see `SampleStream`; or the window or batch is below 1.
    """

    def __init__(
        self,
        tables: Mapping[str, SourceTable],
        shares: Mapping[str, Share],
        settings: PlanSettings,
    ) -> None:
        if settings.window < 1:
            raise ValueError(
                f"the packing window is {settings.window}; it must be at least 1 sample"
            )
        if settings.batch < 1:
            raise ValueError(f"the global batch is {settings.batch}; it must be at least 1 pack")
        assert (settings.order is PackOrder.random) == (settings.cost is None)
        self.settings = settings
        self._tables = {source: tables[source] for source in sorted(shares)}
        self._shares = dict(shares)
        self._stream = SampleStream(
            self._tables,
            shares,
            most_tokens=settings.limits.tokens,
            most_tiles=settings.limits.most_tiles,
            when_source_ends=settings.when_source_ends,
            seed=settings.seed,
        )
        self.left_out = self._stream.left_out
        self._state = Mark.start(len(self._tables))
        self._marks = [self._state]
        self._recent = [self._state]
        self._stride = 1
        self._rounds: dict[int, PackTable] = {}
        self._ended_at: int | None = None

    def __getitem__(self, number: int) -> tuple[PlannedSample, ...]:
        """Pack `number`; plans as many windows as it takes.

        Raises:
            DataEndedError: there are fewer packs.
        """
        if number < 0:
            raise ValueError(f"pack {number} was asked for; packs are numbered from 0")
        first, table = self._round_of(number)
        members = slice(*table.bounds_P[number - first : number - first + 2].tolist())
        sources = self._stream.sources
        return tuple(
            PlannedSample(sources[source], index, epoch, length, tiles)
            for source, index, epoch, length, tiles in zip(
                table.source_N[members].tolist(),
                table.index_N[members].tolist(),
                table.epoch_N[members].tolist(),
                table.length_N[members].tolist(),
                table.tiles_N[members].tolist(),
                strict=True,
            )
        )

    def packs(self, start: int, stop: int) -> list[tuple[PlannedSample, ...]]:
        """Packs start ... stop - 1."""
        return [self[number] for number in range(start, stop)]

    def rounds(self) -> Iterator[PackTable]:
        """All packs from the first, a round at a time; endless where a source is."""
        number = 0
        while self._ended_at is None or number < self._ended_at:
            try:
                _, table = self._round_of(number)
            except DataEndedError:
                return
            yield table
            number += len(table)

    def mark(self, number: int) -> Mark:
        """A mark at or before pack `number`, the latest of those that are kept."""
        known = [mark for mark in (*self._marks, *self._recent) if mark.first_pack <= number]
        return max(known, key=lambda mark: mark.first_pack)

    def remember(self, mark: Mark) -> None:
        """Learn of a state far from the start, which makes the packs after it quick to reach."""
        self._recent.append(mark)

    @property
    def total_samples(self) -> float:
        """Samples of all packs together; infinite where a source never ends."""
        return self._stream.total

    def fingerprint(self) -> str:
        """Changes with everything that the order of packs depends on."""
        digest = hashlib.blake2b(digest_size=8)
        constants = (FULL_ENOUGH, MOST_WAITS, ROUND_BATCHES)
        digest.update(repr((self.settings, sorted(self._shares.items()), constants)).encode())
        for source, table in self._tables.items():
            digest.update(source.encode())
            for column in (table.lengths_N, table.tiles_N):
                digest.update(np.ascontiguousarray(column, dtype=np.int32).data)
        return digest.hexdigest()

    def _round_of(self, number: int) -> tuple[int, PackTable]:
        """The round that holds a pack, and the number of its first pack."""
        for first, table in self._rounds.items():
            if first <= number < first + len(table):
                return first, table
        if self._ended_at is not None and number >= self._ended_at:
            raise DataEndedError(
                f"the data ends after pack {self._ended_at}: pack {number} is none"
            )
        mark = self.mark(number)
        if not mark.first_pack <= self._state.first_pack <= number:
            self._state = mark
        while True:  # every round moves on by at least one pack, or is the last
            first = self._state.first_pack
            table = self._next_round()
            if first <= number < first + len(table):
                return first, table
            if self._ended_at is not None and number >= self._ended_at:
                return self._round_of(number)

    def _next_round(self) -> PackTable:
        """Plan the round after the state, keep it, and move the state on."""
        state, settings = self._state, self.settings
        self._stream.drawn = list(state.drawn)
        waiting, waits_N = state.waiting, state.waits_N
        tables = [self._table(state.pool, state.pool_bounds_P)]
        num_packs, ended = len(tables[0]), False
        while num_packs < ROUND_BATCHES * settings.batch and not ended:
            fresh = self._stream.take(settings.window)
            ended = len(fresh) < settings.window
            table, waiting, waits_N = self._window(fresh, waiting, waits_N, last=ended)
            tables.append(table)
            num_packs += len(table)
        whole = PackTable.joined(tables)
        order_P, later_P = self._order(whole, len(tables[0]), ended)
        table, later = whole.take(order_P), whole.take(later_P)
        if ended:
            self._ended_at = state.first_pack + len(table)
        self._state = Mark(
            first_pack=state.first_pack + len(table),
            round=state.round + 1,
            drawn=tuple(self._stream.drawn),
            waiting=waiting,
            waits_N=waits_N,
            pool=Drawn(later.source_N, later.draw_N),
            pool_bounds_P=later.bounds_P,
        )
        self._keep(state.first_pack, table)
        return table

    def _keep(self, first: int, table: PackTable) -> None:
        """Keep a round and the mark after it; forget old rounds and thin out the marks."""
        self._rounds[first] = table
        while len(self._rounds) > KEPT_ROUNDS:
            self._rounds.pop(next(iter(self._rounds)))
        state = self._state
        self._recent = [*self._recent[-KEPT_ROUNDS:], state]
        if state.round % self._stride == 0 and state.first_pack > self._marks[-1].first_pack:
            self._marks.append(state)
        if len(self._marks) > KEPT_MARKS:
            self._marks, self._stride = self._marks[::2], 2 * self._stride

    def _table(self, drawn: Drawn, bounds_P: NDArray[np.int64] | None = None) -> PackTable:
        """Samples with all that is known of them: packed as `bounds_P` says, or one a pack."""
        index_N, epoch_N = self._stream.locate(drawn)
        length_N, tiles_N = self._stream.sizes(drawn, index_N)
        if bounds_P is None:
            bounds_P = np.arange(len(drawn) + 1)
        return PackTable(
            drawn.source_N, drawn.draw_N, index_N, epoch_N, length_N, tiles_N, bounds_P
        )

    def _window(
        self, fresh: Drawn, waiting: Drawn, waits_N: NDArray[np.int64], *, last: bool
    ) -> tuple[PackTable, Drawn, NDArray[np.int64]]:
        """Pack one window: its finished packs, and the samples given back with their waits."""
        settings = self.settings
        source_N = np.concatenate([waiting.source_N, fresh.source_N])
        members = Drawn(source_N, np.concatenate([waiting.draw_N, fresh.draw_N]))
        singles = self._table(members)
        if not settings.packing or len(members) == 0:
            return singles, NOBODY, NONE
        waits_N = np.concatenate([waits_N, np.zeros(len(fresh), dtype=np.int64)])
        pack_of_N = pack(
            settings.packer,
            self._padded(singles.length_N),
            singles.tiles_N,
            settings.limits,
            settings.spare_packs,
        )
        order_N = np.argsort(pack_of_N, kind="stable")
        packed = PackTable.grouped(singles.members, pack_of_N)
        if last or settings.packer is Packer.balanced:
            return packed, NOBODY, NONE
        back_P = self._given_back(packed, waits_N[order_N])
        back_N = back_P[packed.pack_of()]
        returned = Drawn(packed.source_N[back_N], packed.draw_N[back_N])
        return packed.take(np.flatnonzero(~back_P)), returned, waits_N[order_N][back_N] + 1

    def _given_back(self, packed: PackTable, waits_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which packs give their samples back: the emptiest, at most half a window of samples."""
        limits = self.settings.limits
        counts_P = np.diff(packed.bounds_P)
        tokens_P = packed.total(self._padded(packed.length_N))
        full_P = tokens_P >= FULL_ENOUGH * limits.tokens
        full_P |= packed.total(packed.tiles_N) >= FULL_ENOUGH * limits.most_tiles
        full_P |= counts_P >= limits.most_samples
        oldest_P = np.zeros(len(packed), dtype=np.int64)
        np.maximum.at(oldest_P, packed.pack_of(), waits_N)
        candidates = np.flatnonzero(~full_P & (oldest_P < MOST_WAITS))
        emptiest = candidates[np.argsort(tokens_P[candidates], kind="stable")]
        few = np.cumsum(counts_P[emptiest]) <= max(1, self.settings.window // 2)
        back_P = np.zeros(len(packed), dtype=np.bool_)
        back_P[emptiest[few]] = True
        return back_P

    def _order(
        self, packed: PackTable, num_old: int, ended: bool
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The order of a round's packs, and the packs that wait for the next.

        Args:
            num_old: packs at the front that have waited already and go out now.
        """
        settings, number = self.settings, self._state.round
        rest = len(packed) % settings.batch
        words = (settings.seed, "round", number)
        newest = num_old + shuffled_order(len(packed) - num_old, *words, "later")
        if ended:
            newest = shuffled_order(len(packed), *words, "later")
        odd = np.sort(newest[:rest])
        even = np.setdiff1d(np.arange(len(packed)), odd, assume_unique=True)
        if settings.order is PackOrder.aligned:
            order = even[aligned_order(self._costs(packed)[even], settings.run, *words)]
        else:
            order = even[shuffled_order(len(even), *words)]
        return (np.concatenate([order, odd]), NONE) if ended else (order, odd)

    def _costs(self, packed: PackTable) -> NDArray[np.int64]:
        """What each pack costs to train on, its padding included."""
        cost, length = self.settings.cost, self.settings.limits.tokens
        assert cost is not None
        padded_N = self._padded(packed.length_N)
        rest_P = length - packed.total(padded_N)
        squares_P = packed.total(padded_N**2) + rest_P**2
        tokens_P = np.full(len(packed), length, dtype=np.int64)
        return cost.of(tokens_P, packed.total(packed.tiles_N), squares_P)

    def _padded(self, length_N: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lengths as they stand in a pack."""
        alignment = self.settings.alignment
        return -(-length_N // alignment) * alignment
