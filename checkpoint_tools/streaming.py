"""Walks tensors from one folder to another, a rule at a time.

Reading and transforming happen here, writing in one other thread and hashing in a third, so that a
disk, a core for SHA-256 and a core for copies are all busy. At any moment the tensors of one rule
are being made while those of the rule before are written: the peak is the program itself plus
about three times the largest tensor.

Output goes to shards that are planned beforehand from shapes; a shard that an earlier attempt
finished is read again, compared by hash and kept.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.tensor_bytes import DTYPE_NAMES, DTYPES, sha256
from checkpoint_tools.workspace import Workspace

Record = dict[str, dict[str, Any]]
"""Of a shard: name of each tensor to its dtype, shape, sha256 and, where needed, its place."""


@dataclass(frozen=True)
class Task:
    """One rule at work.

    Attributes:
        inputs: names to read.
        outputs: what comes of them, by name, in the order `run` gives them.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, TensorSpec]
    run: Callable[[Sequence[Tensor]], list[Tensor]]

    @property
    def num_bytes(self) -> int:
        """Bytes it writes."""
        return sum(spec.num_bytes for spec in self.outputs.values())


@dataclass(frozen=True)
class Shard:
    """The tasks whose outputs share a file."""

    file: str
    tasks: tuple[Task, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Its tensors, in order."""
        return {name: spec for task in self.tasks for name, spec in task.outputs.items()}

    @property
    def num_bytes(self) -> int:
        """Its tensors' bytes."""
        return sum(task.num_bytes for task in self.tasks)


class Writer(Protocol):
    """A file that takes tensors one after another."""

    def write(self, name: str, tensor: Tensor) -> dict[str, int]:
        """Append a tensor; returns what its record needs to find it again."""

    def finish(self) -> None:
        """Flush to disk and close."""

    def close(self) -> None:
        """Close after an error."""


@dataclass(frozen=True)
class Format:
    """A kind of file: how one is opened for writing, and a tensor read back by its record."""

    open: Callable[[Path, Mapping[str, TensorSpec]], Writer]
    read: Callable[[Path, str, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    file: str
    done: int
    total: int
    seconds: float

    def __str__(self) -> str:
        rate = self.done / max(self.seconds, 1e-9) / 1e9
        return f"{self.file}: {self.done / 1e9:.2f} of {self.total / 1e9:.2f} GB, {rate:.2f} GB/s"


Report = Callable[[Progress], None]


def plan_shards(tasks: Sequence[Task], most: int, name: Callable[[int, int], str]) -> list[Shard]:
    """Fill shards of at most `most` bytes in order; one larger task gets a shard of its own.

    Args:
        name: file name from the shard's number, from 0, and the number of shards.
    """
    groups: list[list[Task]] = []
    size = most + 1
    for task in tasks:
        if size + task.num_bytes > most:
            groups.append([])
            size = 0
        groups[-1].append(task)
        size += task.num_bytes
    return [Shard(name(i, len(groups)), tuple(group)) for i, group in enumerate(groups)]


class Stream:
    """One conversion.

    Args:
        read: gives an input by name.
        folder: where the shards go, inside the workspace.
        expected: SHA-256 of inputs, where they are known; a differing one is an error.
        report: called after every shard and about once a second.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        workspace: Workspace,
        folder: Path,
        kind: Format,
        report: Report,
        expected: Mapping[str, str] | None = None,
    ) -> None:
        self._read, self._workspace, self._folder, self._kind = read, workspace, folder, kind
        self._report, self._expected = report, expected or {}
        self._done = self._written = 0

    def run(self, shards: Sequence[Shard]) -> dict[str, Record]:
        """Write every shard that is not there yet.

        Returns:
            The record of each shard, by file.

        Raises:
            ConversionError: an input is not what its hash says.
        """
        self._total = sum(shard.num_bytes for shard in shards)
        self._started = self._last = time.perf_counter()
        records: dict[str, Record] = {}
        self._folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(1) as writing, ThreadPoolExecutor(1) as hashing:
            for shard in shards:
                earlier = self._workspace.finished.get(shard.file)
                if earlier is None or not self._intact(shard, earlier):
                    earlier = self._write(shard, writing, hashing)
                    self._workspace.finish_file(shard.file, earlier)
                else:
                    self._done += shard.num_bytes
                records[shard.file] = earlier
                self._tell(shard.file, always=True)
        return records

    def _intact(self, shard: Shard, record: Record) -> bool:
        if list(record) != list(shard.specs):
            return False
        path = self._folder / shard.file
        try:
            return all(
                sha256(self._kind.read(path, name, entry)) == entry["sha256"]
                for name, entry in record.items()
            )
        except (OSError, EOFError, RuntimeError, ValueError):
            return False

    def _write(
        self, shard: Shard, writing: ThreadPoolExecutor, hashing: ThreadPoolExecutor
    ) -> Record:
        writer = self._kind.open(self._folder / shard.file, shard.specs)
        record: Record = {}
        pending: Future[None] | None = None
        try:
            for task in shard.tasks:
                outputs, hashes = self._make(task, hashing)
                if pending is not None:
                    pending.result()
                pending = writing.submit(_put, writer, task, outputs, hashes, record)
                del outputs
                self._done += task.num_bytes
                self._tell(shard.file)
            if pending is not None:
                pending.result()
            writing.submit(writer.finish).result()
        except BaseException:
            if pending is not None:
                pending.exception()
            writer.close()
            raise
        return record

    def _make(
        self, task: Task, hashing: ThreadPoolExecutor
    ) -> tuple[list[Tensor], list[Future[str]]]:
        """Outputs of a task and their hashes to come; inputs with a known hash are checked."""
        inputs = [self._read(name) for name in task.inputs]
        checked = {
            name: hashing.submit(sha256, tensor)
            for name, tensor in zip(task.inputs, inputs, strict=True)
            if name in self._expected
        }
        outputs = [
            tensor.to(spec.dtype).contiguous()
            for tensor, spec in zip(task.run(inputs), task.outputs.values(), strict=True)
        ]
        hashes = []
        for output in outputs:
            same = [n for n, t in zip(task.inputs, inputs, strict=True) if t is output]
            known = checked.get(same[0]) if same else None
            hashes.append(known or hashing.submit(sha256, output))
        for name, found in checked.items():
            if found.result() != self._expected[name]:
                raise ConversionError(
                    f"{name} is not what its recorded SHA-256 says: the file that holds it was "
                    "changed after it was written"
                )
        return outputs, hashes

    def _tell(self, file: str, *, always: bool = False) -> None:
        now = time.perf_counter()
        if always or now - self._last > 1.0:
            self._last = now
            self._report(Progress(file, self._done, self._total, now - self._started))


def _put(
    writer: Writer,
    task: Task,
    outputs: list[Tensor],
    hashes: list[Future[str]],
    record: Record,
) -> None:
    """Write the outputs of a task and note them; the tensors are let go one by one."""
    for (name, spec), hashed in zip(task.outputs.items(), hashes, strict=True):
        place = writer.write(name, outputs.pop(0))
        record[name] = {
            "dtype": DTYPE_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "sha256": hashed.result(),
            **place,
        }


def spec_of(entry: Mapping[str, Any]) -> TensorSpec:
    """The dtype and shape of a record's entry."""
    return TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def cast(dtype: torch.dtype, spec: TensorSpec) -> TensorSpec:
    """A spec in another floating type; what is not floating stays."""
    return TensorSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
