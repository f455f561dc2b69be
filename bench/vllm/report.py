"""Rows of the comparison: as a line each, and as the files that are kept."""

import datetime
import json
import platform
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.vllm.follow import Followed

HEAD = (
    f"{'question':19} {'prompt':>6}  {'tokens':>6} {'behind':>7} {'log-p':>7} {'at most':>7}   "
    f"{'as served':>9} {'behind':>7} {'log-p':>7}   {'together':>8} {'chat':>6}"
)


@dataclass(frozen=True)
class Row:
    """One question to one release in one type.

    Attributes:
        prompt: its tokens; 0 where the two read different ones.
        readings: of the answer asked alone: ours, and as served where pictures are shown.
        again: by another way of asking, tokens of its answer that are those of this one.
        pixels: how far the encoder's two inputs lie apart at most, of 255.
        why: what failed; empty where nothing did.
    """

    release: str
    dtype: str
    question: str
    prompt: int
    readings: tuple[Followed, ...]
    again: dict[str, int]
    pixels: float
    why: str

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return not self.why

    def line(self) -> str:
        """For people."""
        first, rest = self.readings[0], self.readings[1:]
        served = " " * 25
        if rest:
            served = f"{_of(rest[0]):>9} {rest[0].behind:7.1e} {rest[0].mean:7.1e}"
        ways = [
            f"{self.again[way]}/{first.tokens}" if way in self.again else "-"
            for way in ("together", "chat")
        ]
        why = f"   FAILED: {self.why}" if self.why else ""
        return (
            f"{self.question:19} {self.prompt:6}  {_of(first):>6} {first.behind:7.1e} "
            f"{first.mean:7.1e} {first.largest:7.1e}   {served}   {ways[0]:>8} {ways[1]:>6}{why}"
        )


def _of(read: Followed) -> str:
    return f"{read.equal}/{read.tokens}"


def lines(rows: list[Row], about: dict[str, Any]) -> list[str]:
    """The whole table."""
    said = [f"{name}: {value}" for name, value in about.items()]
    for release, dtype in dict.fromkeys((row.release, row.dtype) for row in rows):
        said += ["", f"{release}, {dtype}", HEAD]
        said += [row.line() for row in rows if (row.release, row.dtype) == (release, dtype)]
    failed = sum(not row.passed for row in rows)
    return [*said, "", f"{len(rows) - failed} of {len(rows)} comparisons hold"]


def write(out: Path, rows: list[Row], about: dict[str, Any]) -> list[Path]:
    """Leave table and data, named by date; returns both files."""
    out.mkdir(parents=True, exist_ok=True)
    base = out / f"{datetime.date.today().isoformat()}_vllm_{platform.machine()}"
    table, data = base.with_suffix(".md"), base.with_suffix(".json")
    table.write_text(
        "\n".join(["# make certify-vllm", "", "```text", *lines(rows, about), "```", ""])
    )
    data.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return [table, data]
