"""Work in processes: in order, counted, called off, and never without its parent."""

import os
import subprocess
import sys
import time

import pytest

from megatron_vl.data.workers import advance, each
from tests.conftest import REPOSITORY


def square(number: int) -> int:
    for _ in range(number % 4):
        advance()
    return number * number


def slow(number: int) -> int:
    for _ in range(2000):
        advance()
        time.sleep(0.01)
    return number


def dies(number: int) -> int:
    os._exit(9)


def fails(number: int) -> int:
    if number == 3:
        raise ValueError("three")
    return number


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order_and_are_counted(workers: int) -> None:
    told: list[int] = []
    found = list(each(square, range(30), workers=workers, tell=told.append))
    assert found == [number * number for number in range(30)]
    assert told == sorted(told)
    assert told[-1] == sum(number % 4 for number in range(30))


def test_an_error_comes_out_where_it_was() -> None:
    results = each(fails, range(8), workers=2)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)


def test_work_can_be_called_off() -> None:
    results = each(slow, range(4), workers=2, tell=_stop_soon)
    with pytest.raises(KeyboardInterrupt):
        next(results)


def _stop_soon(done: int) -> None:
    if done > 3:
        raise KeyboardInterrupt


def test_a_dead_worker_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a worker process died"):
        list(each(dies, range(3), workers=2))


def test_no_workers() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        list(each(square, [1], workers=0))


def test_a_converting_process_loads_no_torch() -> None:
    """It is spawned for every worker; torch would cost it seconds."""
    program = (
        "import sys, megatron_vl.data.convert.run\n"
        "assert not {'torch', 'megatron.energon', 'pyarrow'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=REPOSITORY)
