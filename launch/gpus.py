"""The GPUs of this machine and their health, as `nvidia-smi` tells; no package is imported for it.

What: name, memory, temperature, and what makes a GPU unfit: memory errors that could not be
corrected, and memory that waits for a reset to be retired.
What it refuses: nothing; a machine without the command has no GPUs. A line that is not of the form
asked for is named, its GPU is not counted. What it costs: one call.
"""

import shutil
import subprocess
from dataclasses import dataclass

_FIELDS = (
    "index", "name", "memory.total", "temperature.gpu", "ecc.errors.uncorrected.volatile.total",
    "retired_pages.pending",
)  # fmt: skip
_PATIENCE_SECONDS = 60


@dataclass(frozen=True)
class Gpu:
    """One GPU. Memory in GB, temperature in degrees Celsius; None where the GPU does not tell."""

    index: str
    name: str
    memory_gb: float | None
    temperature: int | None
    problems: tuple[str, ...]

    def __str__(self) -> str:
        facts = [] if self.memory_gb is None else [f"{self.memory_gb:.0f} GB"]
        facts += [] if self.temperature is None else [f"{self.temperature} C"]
        return f"{self.name} ({', '.join(facts)})" if facts else self.name


def read_gpus() -> tuple[list[Gpu], str]:
    """Every GPU, and what the query itself met ("" when nothing)."""
    if shutil.which("nvidia-smi") is None:
        return [], ""
    words = ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=_PATIENCE_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi did not answer: {error}"
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())
        return [], f"nvidia-smi failed: {said or f'exit status {done.returncode}'}"
    rows = [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
    read = [_gpu(*row) for row in rows if len(row) == len(_FIELDS)]
    unread = [", ".join(row) for row in rows if len(row) != len(_FIELDS)]
    if not unread:
        return read, ""
    lines = f"{len(unread)} of {len(rows)} lines that are not of {len(_FIELDS)} columns"
    return read, f"nvidia-smi printed {lines}, the first is {unread[0]!r}"


def _gpu(index: str, name: str, memory: str, temperature: str, errors: str, pending: str) -> Gpu:
    problems = []
    if errors.isdigit() and int(errors):
        problems.append(f"GPU {index} ({name}) has {errors} uncorrected memory errors")
    if pending == "Yes":
        problems.append(f"GPU {index} ({name}) waits for a reset to retire memory")
    return Gpu(
        index=index,
        name=name,
        memory_gb=int(memory) * 2**20 / 1e9 if memory.isdigit() else None,
        temperature=int(temperature) if temperature.isdigit() else None,
        problems=tuple(problems),
    )
