"""A pool gives up on ranks that hang, however little time a busy machine gives the others."""

import time

import pytest

from tests.support import ranks


def spin() -> None:
    """Compute for ever."""
    while True:
        pass


def test_patience_counts_what_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    spent = iter([[1.0, 1.0], [1.0, 4.0], [1.0, 4.2], [1.0, 9.0]])
    clock = iter([0.0, 80.0, 160.0, 171.0])
    monkeypatch.setattr(ranks._Patience, "_computed", lambda self: next(spent))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    patience = ranks._Patience([])
    patience.check(0)  # the other rank has computed
    patience.check(0)  # neither has, for 80 seconds
    monkeypatch.setattr(ranks, "CPU_SECONDS", 7.5)
    with pytest.raises(ranks.RankFailed, match="no answer after 8 s of CPU, 171 s"):
        patience.check(1)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [(time.sleep, (600,), "no rank has computed for 3 s"), (spin, (), "s of CPU")],
)
def test_ranks_that_hang_are_found(
    monkeypatch: pytest.MonkeyPatch, function: object, arguments: tuple[int, ...], said: str
) -> None:
    assert callable(function)
    pool = ranks.RankPool(1)
    try:
        assert pool.run(1, int, 5) == [5]
        monkeypatch.setattr(ranks, "IDLE_SECONDS", 3.0)
        monkeypatch.setattr(ranks, "CPU_SECONDS", 1.0)
        with pytest.raises(ranks.RankFailed, match=said):
            pool.run(1, function, *arguments)
        monkeypatch.undo()
        assert pool.run(1, int, 6) == [6]
    finally:
        pool.close()
