"""Runs a function over items in processes of their own, and says how far they are.

Processes are spawned, not forked: nothing of torch's threads comes along. They end when their
parent does, however it ends, and leave Ctrl-C to it. With one worker everything runs in the calling
process.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.sharedctypes import Synchronized
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_POLL_SECONDS = 0.25
_AHEAD = 4
"""Items handed to the pool for each worker; the others wait, so that an early end costs little."""


class Stopped(Exception):
    """The work was called off while it ran."""


class _Here:
    """What `advance` counts into: a number of this process, or one shared with the parent."""

    done = 0
    tell: Callable[[int], None] | None = None
    shared: "Synchronized[int] | None" = None
    stop: Any = None


def advance(count: int = 1) -> None:
    """Tell that this much more of the work is done; raises Stopped when it was called off."""
    if _Here.shared is not None:
        with _Here.shared.get_lock():
            _Here.shared.value += count
        if _Here.stop.is_set():
            raise Stopped
        return
    _Here.done += count
    if _Here.tell is not None:
        _Here.tell(_Here.done)


def _begin(shared: "Synchronized[int]", stop: Any) -> None:
    """Prepare a worker process."""
    _Here.shared, _Here.stop = shared, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("ignore")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def each(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    *,
    workers: int,
    tell: Callable[[int], None] = lambda done: None,
) -> Iterator[Result]:
    """Results of the function, in the order of the items.

    Args:
        function: importable by name, as its items and results must be picklable.
        tell: is told now and then how much `advance` has counted.

    Raises:
        ValueError: fewer than one worker.
        RuntimeError: a worker process died, by a signal or for want of memory.
    """
    if workers < 1:
        raise ValueError(f"{workers} workers were asked for; it must be at least 1")
    if workers > 1:
        yield from _in_pool(function, items, workers, tell)
        return
    _Here.done, _Here.tell = 0, tell
    try:
        for item in items:
            yield function(item)
    finally:
        _Here.tell = None


def _in_pool(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    workers: int,
    tell: Callable[[int], None],
) -> Iterator[Result]:
    context = multiprocessing.get_context("spawn")
    shared = context.Value("q", 0)
    stop = context.Event()
    waiting = iter(items)
    running: list[Future[Result]] = []
    pool = ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(shared, stop))
    try:
        while True:
            while len(running) < workers * _AHEAD:
                try:
                    running.append(pool.submit(function, next(waiting)))
                except StopIteration:
                    break
            if not running:
                return
            while not running[0].done():
                wait(running[:1], timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
                tell(shared.value)
            yield running.pop(0).result()
            tell(shared.value)
    except BrokenProcessPool as error:
        raise RuntimeError(
            "a worker process died, by a signal or for want of memory; fewer workers need less"
        ) from error
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
