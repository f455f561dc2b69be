"""The journal of a run: one JSON line an event, only ever appended to.

Receipts say how things stand, the journal how they came to. Several processes may append at once:
each event is one write to a file opened with O_APPEND, which the system does not interleave.
"""

import errno
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_vl.run.receipt import now

EVENTS = (
    "planned", "submitted", "released", "started", "saved", "signalled", "requeued", "ended",
    "cancelled", "examined", "excluded", "readmitted", "gated", "overridden", "quarantined",
)  # fmt: skip


class Journal:
    """Appends to and reads one `journal.jsonl`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(
        self,
        event: str,
        *,
        stage: str | None = None,
        attempt: int | None = None,
        job: str | None = None,
        **fields: Any,
    ) -> None:
        """Append one event with the time; `job` defaults to the Slurm job this process runs in."""
        if event not in EVENTS:
            raise ValueError(f"no event {event!r}; the journal knows {', '.join(EVENTS)}")
        record = {
            "time": now(),
            "event": event,
            "stage": stage,
            "attempt": attempt,
            "job": job or os.environ.get("SLURM_JOB_ID"),
            **fields,
        }
        line = json.dumps(record, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(handle).st_size
            if size and os.pread(handle, 1, size - 1) != b"\n":
                line = "\n" + line  # a full disk has cut the last line short
            text = line.encode()
            if os.write(handle, text) < len(text):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
        finally:
            os.close(handle)

    def read(self) -> list[dict[str, Any]]:
        """All events, oldest first; a line cut short by a crash or a full disk is left out."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [event for line in lines[:-1] if (event := _event(line)) is not None]


def _event(line: str) -> dict[str, Any] | None:
    """The event of a line; None for one that was cut short."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def wall_seconds(events: list[dict[str, Any]]) -> dict[str, float]:
    """Wall time of each stage over all its attempts that ended, from `started` to `ended` events.

    It includes what a rank's own clock cannot see: its start, its end, and attempts that failed.
    """
    started: dict[tuple[str, int], datetime] = {}
    spent: dict[str, float] = {}
    for event in events:
        key = (event["stage"], event["attempt"])
        if event["event"] == "started":
            started[key] = datetime.fromisoformat(event["time"])
        elif event["event"] == "ended" and key in started:
            length = datetime.fromisoformat(event["time"]) - started.pop(key)
            spent[event["stage"]] = spent.get(event["stage"], 0.0) + length.total_seconds()
    return spent
