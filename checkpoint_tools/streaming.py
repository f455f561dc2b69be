"""Walks tensors from one folder to another, a rule at a time.

Output goes to shards that are planned beforehand from shapes, so each core takes the next rule,
whatever the others do: it reads, transforms, hashes and writes. A tensor that only gets another
name or becomes a part goes from one file to the other in blocks and is never held; those that a
rule makes, and inputs that lie in pieces, are held one task at a time, as many tasks at once as
fit into `FREE_BYTES` and three times the largest tensor.

A shard that an earlier attempt finished is read again, compared by hash and kept.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoint_tools.errors import ConversionError
from checkpoint_tools.planned_file import FilePlan, PlannedFile
from checkpoint_tools.safetensors_file import TensorSpec
from checkpoint_tools.tensor_bytes import DTYPE_NAMES, DTYPES, mapped_tensor, sha256
from checkpoint_tools.wording import size_text
from checkpoint_tools.workspace import Workspace

FREE_BYTES = 10**9
"""What tasks may hold together besides three times the largest tensor."""
MOST_WORKERS = 4
"""More threads do not make SHA-256 and one disk faster by much."""

Record = dict[str, dict[str, Any]]
"""Of a shard: name of each tensor to its dtype, shape and sha256."""


@dataclass(frozen=True)
class Task:
    """One rule at work.

    Attributes:
        inputs: names to read.
        outputs: what comes of them, by name, in the order `run` gives them.
        input_bytes: of the inputs, where reading may put them together in memory.
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, TensorSpec]
    run: Callable[[Sequence[Tensor]], list[Tensor]]
    input_bytes: int = 0

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


@dataclass(frozen=True)
class Progress:
    """How far a conversion is."""

    file: str
    done: int
    total: int
    seconds: float

    def __str__(self) -> str:
        rate = self.done / max(self.seconds, 1e-9) / 1e9
        done, total = size_text(self.done), size_text(self.total)
        return f"{self.file}: {done} of {total}, {rate:.2f} GB/s"


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
        read: gives an input by name, from any thread; mapped ones take no memory.
        folder: where the shards go, inside the workspace.
        plan: lays out a shard's file.
        report: called after every shard and about once a second.
        expected: SHA-256 of inputs, where they are known; a differing one is an error.
        grown: told how many bytes at the start of a shard's file are final, as they come.
    """

    def __init__(
        self,
        read: Callable[[str], Tensor],
        workspace: Workspace,
        folder: Path,
        plan: Callable[[Mapping[str, TensorSpec]], FilePlan],
        report: Report,
        expected: Mapping[str, str] | None = None,
        grown: Callable[[str, int], None] = lambda file, size: None,
    ) -> None:
        self._read, self._workspace, self._folder, self._plan = read, workspace, folder, plan
        self._report, self._expected, self._grown = report, expected or {}, grown
        self._done = 0

    def run(self, shards: Sequence[Shard]) -> dict[str, Record]:
        """Write every shard that is not there yet.

        Returns:
            The record of each shard, by file.

        Raises:
            ConversionError: an input is not what its hash says.
        """
        self._total = sum(shard.num_bytes for shard in shards)
        self._started = self._last = time.perf_counter()
        largest = max((s.num_bytes for shard in shards for s in shard.specs.values()), default=0)
        self._memory = _Memory(FREE_BYTES + 3 * largest)
        self._folder.mkdir(parents=True, exist_ok=True)
        workers = min(MOST_WORKERS, len(os.sched_getaffinity(0)))
        records: dict[str, Record] = {}
        begun: deque[_Begun] = deque()
        with _torch_in_one_thread(), ThreadPoolExecutor(workers) as pool:
            try:
                for shard, earlier in zip(shards, pool.map(self._earlier, shards), strict=True):
                    if earlier is not None:
                        records[shard.file] = earlier
                        self._done += shard.num_bytes
                        self._grown(shard.file, self._plan(shard.specs).size)
                        self._tell(shard.file, always=True)
                waiting = deque(shard for shard in shards if shard.file not in records)
                while waiting or begun:
                    # While one file is completed the pool goes on with the next one's tasks.
                    while waiting and len(begun) < 2:
                        begun.append(self._begin(waiting.popleft(), pool))
                    records[begun[0].shard.file] = self._complete(begun[0])
                    begun.popleft()
            finally:
                pool.shutdown(cancel_futures=True)
                for one in begun:
                    one.file.close()
        return {shard.file: records[shard.file] for shard in shards}

    def _earlier(self, shard: Shard) -> Record | None:
        """The record of a shard that an earlier attempt finished, if the file is still that."""
        record = self._workspace.finished.get(shard.file)
        if record is None or list(record) != list(shard.specs):
            return None
        path, plan = self._folder / shard.file, self._plan(shard.specs)
        try:
            intact = plan.frame_stands(path) and all(
                sha256(mapped_tensor(path, plan.places[name][0], spec.dtype, spec.shape))
                == record[name]["sha256"]
                for name, spec in shard.specs.items()
            )
        except (OSError, EOFError):
            return None
        return record if intact else None

    def _begin(self, shard: Shard, pool: ThreadPoolExecutor) -> "_Begun":
        plan = self._plan(shard.specs)
        file = PlannedFile(self._folder / shard.file, plan)
        return _Begun(shard, plan, file, [pool.submit(self._do, t, file) for t in shard.tasks])

    def _complete(self, begun: "_Begun") -> Record:
        record: Record = {}
        file = begun.shard.file
        for task, future in zip(begun.shard.tasks, begun.tasks, strict=True):
            record |= future.result()
            self._done += task.num_bytes
            self._grown(file, sum(begun.plan.places[list(task.outputs)[-1]]))
            self._tell(file)
        self._grown(file, begun.plan.size)
        begun.file.finish()
        self._workspace.finish_file(file, record)
        self._tell(file, always=True)
        return record

    def _do(self, task: Task, file: PlannedFile) -> Record:
        """Read, transform, write and hash, in a thread of the pool, and check the inputs."""
        with self._memory.held(task.input_bytes + task.num_bytes):
            inputs = {name: self._read(name) for name in task.inputs}
            outputs = task.run(list(inputs.values()))
            record: Record = {}
            hashes: dict[int, str] = {}
            for name, spec in task.outputs.items():
                tensor = outputs.pop(0).to(spec.dtype).contiguous()
                assert tuple(tensor.shape) == spec.shape, name
                hashes[id(tensor)] = digest = file.write(name, tensor)
                record[name] = {
                    "dtype": DTYPE_NAMES[spec.dtype],
                    "shape": list(spec.shape),
                    "sha256": digest,
                }
            assert not outputs, task.outputs
            for name in inputs.keys() & self._expected.keys():
                # A tensor that went through as it is has been hashed.
                found = hashes.get(id(inputs[name])) or sha256(inputs[name])
                if found != self._expected[name]:
                    raise ConversionError(
                        f"{name} is not what its recorded SHA-256 says: the file that holds it was "
                        "changed after it was written"
                    )
        return record

    def _tell(self, file: str, *, always: bool = False) -> None:
        now = time.perf_counter()
        if always or now - self._last > 1.0:
            self._last = now
            self._report(Progress(file, self._done, self._total, now - self._started))


@dataclass(frozen=True)
class _Begun:
    """A shard in work; its tasks' records to come, in order."""

    shard: Shard
    plan: FilePlan
    file: PlannedFile
    tasks: list[Future[Record]]


class _Memory:
    """Lets tasks begin while the tensors they hold fit; one that never does goes alone."""

    def __init__(self, most: int) -> None:
        self._most, self._held = most, 0
        self._changed = threading.Condition()

    @contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Wait for room for so many bytes, and have it inside."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._most)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


@contextmanager
def _torch_in_one_thread() -> Iterator[None]:
    """Operations of torch stay in the thread that asks: the pool has a thread for every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def spec_of(entry: Mapping[str, Any]) -> TensorSpec:
    """The dtype and shape of a record's entry."""
    return TensorSpec(DTYPES[entry["dtype"]], tuple(entry["shape"]))


def cast(dtype: torch.dtype, spec: TensorSpec) -> TensorSpec:
    """A spec in another floating type; what is not floating stays."""
    return TensorSpec(dtype if spec.dtype.is_floating_point else spec.dtype, spec.shape)
