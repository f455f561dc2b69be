"""A pool of real gloo ranks that outlives a test: imports are paid once, layouts come and go.

`RankPool.run(n, function, ...)` runs a module-level function on n ranks of one world and returns
what each gave back. A rank that raises fails the call with its traceback; a rank that hangs is
found by the deadline, and the pool is started anew for the next call.
"""

import contextlib
import gc
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

DEADLINE_SECONDS = 240.0


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
            return [self._answer(rank, *one) for rank, one in enumerate(chosen)]

    def _start_one(self) -> None:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        # Not daemonic: saving a checkpoint starts writer processes.
        process = context.Process(target=_serve, args=(theirs,))
        process.start()
        theirs.close()
        self._processes.append((process, ours))

    def _answer(
        self, rank: int, process: multiprocessing.process.BaseProcess, connection: Connection
    ) -> Any:
        try:
            if not connection.poll(DEADLINE_SECONDS):
                raise RankFailed(f"rank {rank} did not answer within {DEADLINE_SECONDS:.0f} s")
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
