"""A pool of real gloo ranks that outlives a test: imports are paid once, layouts come and go.

`RankPool.run(n, function, ...)` runs a module-level function on n ranks of one world and returns
what each gave back. A rank that raises fails the call with its traceback; ranks that hang are found
by what they compute (`_Patience`), and the pool is started anew for the next call.
"""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil

CPU_SECONDS = 240.0
"""A rank that has computed for so long does not end."""
IDLE_SECONDS = 90.0
"""Ranks none of which has computed for so long wait for each other."""
LONGEST_SECONDS = 1800.0
_TICK_SECONDS = 2.0


class RankFailed(AssertionError):
    """What one rank raised, with its traceback."""


def _serve(connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)
    from megatron_vl.engine import process_groups

    while (job := connection.recv()) is not None:
        rank, size, world_file, function, args = job
        try:
            process_groups.join_world(rank=rank, size=size, init_method=f"file://{world_file}")
            try:
                result = function(*args)
            finally:
                process_groups.leave_world()
            connection.send((True, result))
        except BaseException:
            connection.send((False, traceback.format_exc()))
        result = None
        _forget_models()


def _forget_models() -> None:
    """Free the models of a job, and with them its process groups' threads, which would add up.

    megatron-core's DistributedDataParallel hangs on hooks that hang on it, through C++ nodes that
    Python's collector does not see into; emptied, it holds nothing else.
    """
    from megatron.core.distributed import DistributedDataParallel

    for thing in gc.get_objects():
        if isinstance(thing, DistributedDataParallel):
            vars(thing).clear()
    gc.collect()


class _Patience:
    """How long a job may take: in CPU time, because a busy machine gives its ranks little of it."""

    def __init__(self, processes: Sequence[multiprocessing.process.BaseProcess]) -> None:
        self._processes = [psutil.Process(process.pid) for process in processes]
        self._started = self._moved = time.monotonic()
        self._at_start = self._seen = self._computed()

    def _computed(self) -> list[float]:
        return [sum(process.cpu_times()[:2]) for process in self._processes]

    def check(self, rank: int) -> None:
        """Raise RankFailed when the answer of `rank` is no longer to be expected."""
        now = time.monotonic()
        try:
            computed = self._computed()
        except psutil.Error as error:
            raise RankFailed(f"a rank died while {rank} was awaited") from error
        if sum(computed) - sum(self._seen) > 0.5:
            self._seen, self._moved = computed, now
        spent = computed[rank] - self._at_start[rank]
        if spent > CPU_SECONDS or now - self._started > LONGEST_SECONDS:
            raise RankFailed(f"no answer after {spent:.0f} s of CPU, {now - self._started:.0f} s")
        if now - self._moved > IDLE_SECONDS:
            raise RankFailed(f"no answer, and no rank has computed for {IDLE_SECONDS:.0f} s")


class RankPool:
    """Up to `size` processes, started on first use.

    Args:
        size: most ranks a world may have.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Run `function(*args)` on `ranks` ranks of one world.

        Returns:
            What each rank returned, in rank order.

        Raises:
            RankFailed: a rank raised, died or did not answer in time.
        """
        assert ranks <= self.size, (ranks, self.size)
        while len(self._processes) < ranks:
            self._start_one()
        with tempfile.TemporaryDirectory() as folder:
            world = Path(folder) / "world"
            chosen = self._processes[:ranks]
            for rank, (_, connection) in enumerate(chosen):
                connection.send((rank, ranks, str(world), function, args))
            patience = _Patience([process for process, _ in chosen])
            return [self._answer(rank, one[1], patience) for rank, one in enumerate(chosen)]

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Not daemonic: saving a checkpoint starts writer processes.
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        self._processes.append((process, ours))

    def _answer(self, rank: int, connection: Connection, patience: _Patience) -> Any:
        try:
            while not connection.poll(_TICK_SECONDS):
                patience.check(rank)
            worked, result = connection.recv()
        except (EOFError, RankFailed) as error:
            self.close()
            raise RankFailed(f"rank {rank}: {error or 'died'}") from error
        if not worked:
            # The other ranks may wait in a collective for this one.
            self.close()
            raise RankFailed(f"rank {rank}:\n{result}")
        return result

    def close(self) -> None:
        """End every rank."""
        for process, connection in self._processes:
            with contextlib.suppress(OSError):
                connection.send(None)
            process.join(timeout=2)
            if process.is_alive():
                process.kill()
                process.join()
            connection.close()
        self._processes.clear()
