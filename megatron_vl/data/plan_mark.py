"""The state of a plan between two rounds, in memory and on disk.

A plan opened at a mark reaches the packs after it without planning those before. Nothing but time
depends on a mark: without one, or with one of another plan, planning starts at the first pack.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.blend import Drawn

NONE = np.empty(0, dtype=np.int64)
NOBODY = Drawn(NONE, NONE)


@dataclass(frozen=True)
class Mark:
    """The state of a plan between two rounds. Samples are told by source and draw."""

    first_pack: int
    round: int
    drawn: tuple[int, ...]
    waiting: Drawn
    waits_N: NDArray[np.int64]
    pool: Drawn
    pool_bounds_P: NDArray[np.int64]

    @classmethod
    def start(cls, num_sources: int) -> "Mark":
        """The state before the first pack."""
        return cls(0, 0, (0,) * num_sources, NOBODY, NONE, NOBODY, np.zeros(1, dtype=np.int64))

    def to_json(self) -> dict[str, Any]:
        """As lists of numbers."""
        return {
            "first_pack": self.first_pack,
            "round": self.round,
            "drawn": list(self.drawn),
            "waiting": [self.waiting.source_N.tolist(), self.waiting.draw_N.tolist()],
            "waits": self.waits_N.tolist(),
            "pool": [self.pool.source_N.tolist(), self.pool.draw_N.tolist()],
            "pool_bounds": self.pool_bounds_P.tolist(),
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "Mark":
        """Back from `to_json`. Raises KeyError, TypeError or ValueError for anything else."""
        waiting, pool = (
            Drawn(*(np.array(numbers, dtype=np.int64) for numbers in record[name]))
            for name in ("waiting", "pool")
        )
        return cls(
            first_pack=int(record["first_pack"]),
            round=int(record["round"]),
            drawn=tuple(int(number) for number in record["drawn"]),
            waiting=waiting,
            waits_N=np.array(record["waits"], dtype=np.int64),
            pool=pool,
            pool_bounds_P=np.array(record["pool_bounds"], dtype=np.int64),
        )


def read_mark(text: str, fingerprint: str) -> Mark | None:
    """A mark as `write_mark` wrote it; None for one of another plan or anything else."""
    try:
        record = json.loads(text)
        return Mark.from_json(record) if record["plan"] == fingerprint else None
    except (KeyError, TypeError, ValueError):
        return None


def write_mark(mark: Mark, fingerprint: str) -> str:
    """A mark as one line of JSON that names its plan."""
    return json.dumps({"plan": fingerprint, **mark.to_json()}) + "\n"
