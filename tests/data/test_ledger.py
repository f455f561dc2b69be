"""The ledger: exact over kills, and a judge of what may be broken."""

from pathlib import Path

import pytest

from megatron_vl.data.ledger import (
    FIRST_LOOK,
    BadDataError,
    BadSample,
    BadSamples,
    BatchRecord,
    Ledger,
    digest_of,
    lineage,
    read_lines,
    saved_samples,
    write_bad,
)


def record(step: int) -> BatchRecord:
    return BatchRecord(
        packs=(4 * step - 4, 4 * step),
        samples=3,
        tokens=90,
        ids=f"{step}",
        sources={"a": 2, "b": 1},
    )


def test_steps_of_lost_weights_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "data.jsonl"
    first = Ledger(path)
    first.opened(step=0, cursor=0, plan="p")
    for step in range(1, 6):
        first.step(step, record(step))
        if step == 3:
            first.saved(step)
    with path.open("a") as file:
        file.write('{"step": 6, "packs": [2')
    second = Ledger(path)
    second.opened(step=3, cursor=12, plan="p")
    assert second.samples == {"a": 6, "b": 3}
    second.step(4, BatchRecord((12, 16), 3, 90, "other", {"a": 3}))
    assert [(line["step"], line["ids"]) for line in lineage(path)] == [
        (1, "1"),
        (2, "2"),
        (3, "3"),
        (4, "other"),
    ]
    assert second.samples == {"a": 9, "b": 3}
    assert saved_samples(path, 3) == {"a": 6, "b": 3}
    assert saved_samples(path, 4) == {}


def test_a_cut_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text('{"step": 1}\n{"st')
    Ledger(path).saved(7)
    assert read_lines(path) == [{"step": 1}, {"saved": 7, "samples": {}}]
    assert read_lines(tmp_path / "none.jsonl") == []


def test_another_plan_is_refused_once_steps_have_followed_the_first(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "data.jsonl")
    ledger.opened(step=0, cursor=0, plan="one")
    ledger.opened(step=0, cursor=0, plan="two")
    ledger.opened(step=2, cursor=8, plan="two")
    with pytest.raises(ValueError, match=r"first 4 steps followed the data order two, .* in three"):
        ledger.opened(step=4, cursor=16, plan="three")


def test_digests_tell_samples_and_their_order_apart() -> None:
    ids = [("a", "k1", 0), ("a", "k2", 0), ("b", "k1", 1)]
    digests = {
        digest_of(ids),
        digest_of(ids[::-1]),
        digest_of(ids[:2]),
        digest_of([*ids[:2], ("b", "k1", 2)]),
        digest_of([*ids[:2], ("c", "k1", 1)]),
    }
    assert len(digests) == 5
    assert digest_of(iter(ids)) == digest_of(ids)


def broken() -> ValueError:
    return ValueError("truncated")


def test_a_share_of_broken_samples_is_borne_and_no_more() -> None:
    """Of 1000 at least, each key once, each source on its own."""
    judge = BadSamples(0.002)
    for _ in range(10):
        judge.good("a")
        judge.good("b")
    for key in ("k1", "k1", "k2", "k1"):
        judge.bad("a", key, broken())
    judge.bad("b", "k1", broken())
    assert judge.counts == {"a": 2, "b": 1}
    with pytest.raises(BadDataError, match=r"3 of 13 samples of source a .* allows 2; .* k1"):
        judge.bad("a", "k3", broken())
    many = BadSamples(0.002)
    for number in range(3000):
        many.good("a")
        if number % 600 == 0:
            many.bad("a", f"k{number}", broken()) if number else None
    assert many.counts["a"] == 4


def test_nothing_good_at_all_is_a_fault_of_the_source() -> None:
    judge = BadSamples(0.5)
    judge.good("b")
    for number in range(FIRST_LOOK - 1):
        judge.bad("a", f"k{number}", broken())
    with pytest.raises(BadDataError, match=r"the source's fault.*: sample k0 of source a"):
        judge.bad("a", "k", broken())


def test_bad_samples_are_written_down(tmp_path: Path) -> None:
    write_bad(tmp_path / "bad.jsonl", BadSample("a", "k", 1, 17, "k2", "truncated"))
    (line,) = read_lines(tmp_path / "bad.jsonl")
    assert line == {
        "bad": {
            "source": "a", "key": "k", "epoch": 1, "pack": 17, "instead": "k2",
            "error": "truncated",
        }
    }  # fmt: skip
