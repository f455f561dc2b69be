"""What a conversion found wrong, row by row, and the report at its end.

`findings.jsonl` beside the shards has one line for every dropped row and every note, in row order;
`conversion.json` has the counts and, for each reason, the first thousand rows. Both hold no times,
so that the same conversion writes the same bytes.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vl.data.convert.conversation import Fault, Reason

REPORT = "conversion.json"
FINDINGS = "findings.jsonl"
LISTED_ROWS = 1000

IDS = np.dtype([("digest", "<u8"), ("file", "<u4"), ("row", "<u8")])
"""What is kept of a row's id, to find duplicates."""


@dataclass(frozen=True)
class Finding:
    """One row and what is to be said of it. Rows count from 1; in a jsonl file they are lines."""

    file: str
    row: int
    reason: str
    detail: str
    id: str = ""

    @classmethod
    def of(cls, file: str, row: int, fault: Fault, name: object) -> "Finding":
        """A fault of a row whose `id` field is `name`."""
        return cls(file, row, fault.reason.value, fault.detail, "" if name is None else str(name))

    @property
    def keeps(self) -> bool:
        """Whether the row was kept."""
        return Reason(self.reason).keeps

    def text(self) -> str:
        """The finding as one line."""
        named = f" (id {self.id})" if self.id else ""
        return f"{self.file}, row {self.row}{named}: {self.reason}: {self.detail}"


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """One JSON line a finding."""
    with path.open("w", encoding="utf-8") as file:
        for found in findings:
            file.write(json.dumps(asdict(found), ensure_ascii=True) + "\n")


def by_reason(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Reasons, the most frequent first, with their counts and first rows."""
    groups: dict[str, list[Finding]] = {}
    for found in findings:
        groups.setdefault(found.reason, []).append(found)
    order = sorted(groups.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        {
            "reason": reason,
            "count": len(found),
            "rows": [[one.file, one.row] for one in found[:LISTED_ROWS]],
        }
        for reason, found in order
    ]


def duplicate_ids(ids: NDArray[np.void], files: Sequence[str]) -> list[Finding]:
    """A note for every kept row whose id an earlier kept row has."""
    order = np.argsort(ids, order=("digest", "file", "row"), kind="stable")
    ids = ids[order]
    starts = np.flatnonzero(np.r_[True, ids["digest"][1:] != ids["digest"][:-1]])
    first = np.repeat(starts, np.diff(np.r_[starts, len(ids)]))
    later = np.flatnonzero(first != np.arange(len(ids)))
    notes = []
    for at in later[np.lexsort((ids["row"][later], ids["file"][later]))]:
        original = ids[first[at]]
        where = f"row {original['row']} of {files[original['file']]} has the same id"
        notes.append(
            Finding(
                files[ids[at]["file"]],
                int(ids[at]["row"]),
                Reason.DUPLICATE_ID.value,
                f"{where}; both were kept, under keys of their own",
            )
        )
    return notes
