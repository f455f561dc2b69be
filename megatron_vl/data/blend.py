"""The order of samples: one stream, mixed from sources by their shares.

Sample k of a source with share w stands at (k + 1/2) / w on a common scale, and the stream is
everything in the order of that scale: after n samples every source has had its share of n to within
a few samples, and the state is how many samples each source has given. Each source goes through
its epochs one after the other, shuffled anew each time.

Refuses a blend without weights above 0 and sources without samples that fit. Cost: about one
microsecond a sample, in arrays; memory only for the samples asked for.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.schema_data import BlendUnit, DataConfig, SourceEnd
from megatron_vl.data.seeds import ROUNDS, half_bits, shuffle_keys, shuffled


@dataclass(frozen=True)
class SourceTable:
    """What the planner knows of a source: a number for each sample, none of its content.

    lengths_N: tokens; 0 for a sample that fits no sequence. tiles_N: of all images of a sample.
    """

    lengths_N: NDArray[np.integer]
    tiles_N: NDArray[np.integer]


@dataclass(frozen=True)
class Share:
    """How much of the stream a source is, and how often it is gone through; 0 epochs is no end."""

    weight: float
    epochs: float = 0.0


@dataclass(frozen=True)
class Drawn:
    """Samples of the stream, N of them.

    source_N: number of the source. draw_N: how many samples the source had given before.
    """

    source_N: NDArray[np.int64]
    draw_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.source_N)


def shares_of(
    data: DataConfig, mean_lengths: Mapping[str, float], *, endless: bool = False
) -> dict[str, Share]:
    """The shares of samples that a data section asks for.

    Args:
        mean_lengths: tokens of a source's samples on average; weights of tokens are divided by
            them.
        endless: leave the epochs out.
    """
    tokens = data.blend_unit is BlendUnit.tokens
    return {
        source: Share(
            weight / mean_lengths[source] if tokens else weight,
            0.0 if endless else data.epochs.get(source, 0.0),
        )
        for source, weight in data.blend.items()
    }


class SampleStream:
    """The stream of samples.

    Args:
        tables: every source, in the order that numbers them.
        shares: of the same sources.
        most_tokens, most_tiles: a sample above either is left out.
        seed: of the shuffles.

    Attributes:
        drawn: samples that each source has given; set it to go on from another place.
        left_out: samples of each source that are never given.

    Raises:
        ValueError: the blend is empty, a weight is not above 0, or no sample of a source fits.
    """

    def __init__(
        self,
        tables: Mapping[str, SourceTable],
        shares: Mapping[str, Share],
        *,
        most_tokens: int,
        most_tiles: int,
        when_source_ends: SourceEnd = SourceEnd.go_on,
        seed: int,
    ) -> None:
        self.sources: Sequence[str] = tuple(tables)
        weights = [shares[source].weight for source in self.sources]
        if not weights or not all(0 < weight < math.inf for weight in weights):
            given = {source: share.weight for source, share in shares.items()}
            raise ValueError(f"the blend is {given}; it needs weights above 0")
        self._weights_S = np.array(weights, dtype=np.float64)
        self._tables, self._seed = list(tables.values()), seed
        self._fitting = [_fitting(table, most_tokens, most_tiles) for table in self._tables]
        self._sizes_S = np.array([self._size(at) for at in range(len(weights))], dtype=np.int64)
        self.left_out = {
            source: len(table.lengths_N) - size
            for source, table, size in zip(
                self.sources, self._tables, self._sizes_S.tolist(), strict=True
            )
        }
        empty = [self.sources[at] for at in np.flatnonzero(self._sizes_S == 0)]
        if empty:
            raise ValueError(f"the blend names {', '.join(empty)}, which have no samples that fit")
        self._halves_S = np.array([half_bits(size) for size in self._sizes_S.tolist()])
        self._limits = self._draw_limits([shares[source].epochs for source in self.sources])
        if when_source_ends is SourceEnd.stop:
            self._end_together()
        self.drawn = [0] * len(weights)

    def _size(self, source: int) -> int:
        fitting = self._fitting[source]
        return len(self._tables[source].lengths_N) if fitting is None else len(fitting)

    def _draw_limits(self, epochs: Sequence[float]) -> list[float]:
        """Samples each source gives before it ends."""
        return [
            max(1, round(often * size)) if often else math.inf
            for often, size in zip(epochs, self._sizes_S.tolist(), strict=True)
        ]

    def _end_together(self) -> None:
        """Let no source give anything after the last sample of the one that ends first."""
        weights = self._weights_S.tolist()
        ends = [(limit - 0.5) / weight for limit, weight in zip(self._limits, weights, strict=True)]
        end = min(ends)
        for source, weight in enumerate(weights):
            if ends[source] > end < math.inf:
                self._limits[source] = math.floor(end * weight + 0.5)

    @property
    def total(self) -> float:
        """Samples of the whole stream; infinite where a source never ends."""
        return sum(self._limits)

    def take(self, count: int) -> Drawn:
        """The next `count` samples; fewer only at the end of the stream."""
        stops = self._stops(count)
        source_N = np.repeat(
            np.arange(len(stops)),
            [stop - drawn for stop, drawn in zip(stops, self.drawn, strict=True)],
        )
        draw_N = np.concatenate(
            [np.arange(drawn, stop) for drawn, stop in zip(self.drawn, stops, strict=True)]
        ).astype(np.int64)
        stands_N = (draw_N + 0.5) / self._weights_S[source_N]
        chosen = np.argsort(stands_N, kind="stable")[:count]
        given_S = np.bincount(source_N[chosen], minlength=len(stops))
        self.drawn = [drawn + int(given) for drawn, given in zip(self.drawn, given_S, strict=True)]
        return Drawn(source_N[chosen], draw_N[chosen])

    def _stops(self, count: int) -> list[int]:
        """For each source, a number of draws that the next `count` samples do not go beyond."""
        weights, start = self._weights_S.tolist(), sum(self.drawn)
        live = [at for at in range(len(weights)) if self.drawn[at] < self._limits[at]]
        reached = min(((self.drawn[at] + 0.5) / weights[at] for at in live), default=0.0)
        within = list(self.drawn)
        while live and (missing := count - sum(within) + start) > 0:
            # Far enough for what is missing unless a source ends, and then there is one fewer.
            reached += (missing + len(live)) / sum(weights[at] for at in live)
            for at in live:
                fair = math.floor(reached * weights[at] + 0.5)
                within[at] = int(min(self._limits[at], max(within[at], fair)))
            live = [at for at in live if within[at] < self._limits[at]]
        # One more each, as the last bit of a product must not decide.
        return [
            int(min(limit, inside + 1)) for limit, inside in zip(self._limits, within, strict=True)
        ]

    def locate(self, drawn: Drawn) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where samples stand in their source's table, and in which epoch they are given."""
        sizes_N = self._sizes_S[drawn.source_N]
        epoch_N, place_N = np.divmod(drawn.draw_N, sizes_N)
        keys_NR = np.empty((len(drawn), ROUNDS), dtype=np.uint64)
        groups = drawn.source_N * (int(epoch_N.max(initial=0)) + 1) + epoch_N
        for first in np.unique(groups, return_index=True)[1].tolist():
            source, epoch = int(drawn.source_N[first]), int(epoch_N[first])
            keys = shuffle_keys(self._seed, self.sources[source], epoch)
            keys_NR[groups == groups[first]] = keys
        index_N = shuffled(place_N, sizes_N, self._halves_S[drawn.source_N], keys_NR)
        for source, fitting in enumerate(self._fitting):
            if fitting is not None:
                mine = drawn.source_N == source
                index_N[mine] = fitting[index_N[mine]]
        return index_N, epoch_N

    def sizes(
        self, drawn: Drawn, index_N: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Lengths and tiles of samples at places of their sources' tables."""
        length_N = np.empty(len(drawn), dtype=np.int64)
        tiles_N = np.empty(len(drawn), dtype=np.int64)
        for source in np.unique(drawn.source_N).tolist():
            mine = drawn.source_N == source
            length_N[mine] = self._tables[source].lengths_N[index_N[mine]]
            tiles_N[mine] = self._tables[source].tiles_N[index_N[mine]]
        return length_N, tiles_N


def _fitting(table: SourceTable, most_tokens: int, most_tiles: int) -> NDArray[np.int32] | None:
    """Places of the samples that fit; None where all do, which is the common case."""
    lengths_N, tiles_N = table.lengths_N, table.tiles_N
    fits = (lengths_N > 0) & (lengths_N <= most_tokens) & (tiles_N <= most_tiles)
    return None if fits.all() else np.flatnonzero(fits).astype(np.int32)
