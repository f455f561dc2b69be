"""The planner: pure, complete, within every limit, well filled, quick to reach anywhere."""

import json
from collections import Counter
from dataclasses import replace
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.schema_data import Packer, PackOrder, SourceEnd
from megatron_vl.cost.pack_cost import PackCost
from megatron_vl.data import plan as plan_room
from megatron_vl.data.blend import Share, SourceTable
from megatron_vl.data.packing import PackLimits
from megatron_vl.data.plan import DataEndedError, PackPlan, PlannedSample, PlanSettings
from megatron_vl.data.plan_mark import Mark, read_mark, write_mark

COST = PackCost(per_token=3, per_tile=500, per_square=1)


def table(count: int, seed: int, most: int = 512) -> SourceTable:
    """The spread of lengths of a real mix: many short, a few long, half with tiles."""
    random = Random(seed)
    lengths = [min(most, max(12, int(random.lognormvariate(4.4, 0.7)))) for _ in range(count)]
    tiles = [length // 40 if random.random() < 0.5 else 0 for length in lengths]
    return SourceTable(np.array(lengths), np.array(tiles))


def plan(count: int = 600, **changes: object) -> PackPlan:
    """Two sources; `epochs` of each, other names change the settings."""
    epochs = changes.pop("epochs", 0.0)
    assert isinstance(epochs, float)
    chosen = PlanSettings(
        limits=PackLimits(512),
        window=200,
        seed=3,
        batch=4,
        order=PackOrder.aligned,
        cost=COST,
        run=4,
    )
    tables = {"a": table(count, 1), "b": table(count // 2, 2)}
    shares = {"a": Share(2.0, epochs), "b": Share(1.0, epochs)}
    return PackPlan(tables, shares, replace(chosen, **changes))  # type: ignore[arg-type]


def everything(made: PackPlan) -> list[tuple[PlannedSample, ...]]:
    return made.packs(0, sum(len(table) for table in made.rounds()))


def names(packs: list[tuple[PlannedSample, ...]]) -> Counter[tuple[str, int, int]]:
    return Counter((s.source, s.index, s.epoch) for pack in packs for s in pack)


limits_drawn = st.builds(
    PackLimits, st.sampled_from([64, 80]), st.sampled_from([0, 4]), st.sampled_from([0, 1, 3])
)


@settings(max_examples=120, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 64), st.integers(0, 4)), min_size=1, max_size=70),
    limits=limits_drawn,
    window=st.integers(1, 40),
    batch=st.integers(1, 5),
    packer=st.sampled_from(list(Packer)),
    alignment=st.sampled_from([1, 8]),
    aligned=st.booleans(),
    packing=st.booleans(),
    epochs=st.sampled_from([0.4, 1.0, 2.5]),
    seed=st.integers(0, 5),
)
def test_every_sample_of_every_epoch_is_in_exactly_one_pack(
    lengths: list[tuple[int, int]],
    limits: PackLimits,
    window: int,
    batch: int,
    packer: Packer,
    alignment: int,
    aligned: bool,
    packing: bool,
    epochs: float,
    seed: int,
) -> None:
    lengths = [
        (max(size, 1) if at == 0 else size, tiles) for at, (size, tiles) in enumerate(lengths)
    ]
    made = PackPlan(
        {"a": SourceTable(*np.array(lengths).T)},
        {"a": Share(1.0, epochs)},
        PlanSettings(
            limits,
            window,
            seed,
            batch=batch,
            packing=packing,
            packer=packer,
            alignment=alignment,
            order=PackOrder.aligned if aligned else PackOrder.random,
            cost=COST if aligned else None,
            run=batch if aligned else 1,
        ),
    )
    packs = everything(made)
    fitting = [at for at, (length, _) in enumerate(lengths) if length]
    given_out = names(packs)
    assert set(given_out.values()) == {1}
    whole = int(epochs)
    for index in fitting:
        times = sum(given_out["a", index, epoch] for epoch in range(4))
        assert whole <= times <= whole + (epochs % 1 > 0)
    assert given_out.total() == max(1, round(epochs * len(fitting)))
    for pack in packs:
        assert sum(-(-s.length // alignment) * alignment for s in pack) <= limits.tokens
        assert not limits.tiles or sum(s.tiles for s in pack) <= limits.tiles
        assert not limits.samples or not packing or len(pack) <= limits.samples
        assert all((s.length, s.tiles) == lengths[s.index] for s in pack)
        assert packing or len(pack) == 1
    with pytest.raises(DataEndedError, match=f"ends after pack {len(packs)}"):
        made[len(packs)]


def test_a_pack_does_not_depend_on_what_was_asked_for_before() -> None:
    whole = plan().packs(0, 300)
    assert whole != plan(seed=4).packs(0, 300)
    again = plan()
    for number in (299, 3, 150, 0, 151, 298):
        assert again[number] == whole[number]


def test_samples_wait_a_bounded_number_of_windows() -> None:
    """Samples too long to share a pack are given back, but not for ever."""
    lengths = np.full(4000, 300)
    lengths[::7] = 40
    made = PackPlan(
        {"a": SourceTable(lengths, np.zeros_like(lengths))},
        {"a": Share(1.0, 1.0)},
        PlanSettings(PackLimits(512), window=50, seed=0, batch=2),
    )
    packs_a_round = plan_room.ROUND_BATCHES * 2
    windows_a_round = -(-packs_a_round // (50 // 2)) + plan_room.MOST_WAITS + 1
    bound = (windows_a_round * 2 + plan_room.MOST_WAITS) * 50
    position = 0
    for planned in made.rounds():
        lag = position - planned.draw_N
        assert lag.max() <= bound
        position += len(planned.draw_N)
    assert position == 4000


def test_realistic_fill() -> None:
    for packer, least in (
        (Packer.best_fit, 0.985),
        (Packer.greedy_knapsack, 0.985),
        (Packer.first_fit, 0.97),
        (Packer.balanced, 0.93),
    ):
        packs = plan(4000, packer=packer, window=1000, spare_packs=0.01).packs(0, 700)
        filled = [sum(sample.length for sample in pack) / 512 for pack in packs]
        assert sum(filled) / len(filled) >= least, packer


def test_leftovers_wait_for_company() -> None:
    """Small windows leave their last pack half empty, unless its samples are given back."""
    alone = plan(window=20, packer=Packer.balanced, spare_packs=0.0).packs(0, 400)
    waiting = plan(window=20).packs(0, 400)

    def fill(packs: list[tuple[PlannedSample, ...]]) -> float:
        return sum(sample.length for pack in packs for sample in pack) / 512 / len(packs)

    assert fill(waiting) > fill(alone) + 0.06


def test_alignment_is_planned_for() -> None:
    packs = everything(plan(alignment=32, epochs=1.0))
    padded = [sum(-(-sample.length // 32) * 32 for sample in pack) for pack in packs]
    assert max(padded) <= 512
    assert sum(padded) / len(padded) / 512 > 0.97


def test_equally_heavy_packs_share_a_batch_and_nothing_else_changes() -> None:
    aligned = plan(3000, window=1000, epochs=1.0)
    mixed = plan(3000, window=1000, epochs=1.0, order=PackOrder.random, cost=None)
    assert names(everything(aligned)) == names(everything(mixed))

    def efficiency(made: PackPlan) -> float:
        """Mean over slowest of 4 ranks with a pack each, by a count of its own."""
        costs = []
        for pack in everything(made):
            used = sum(s.length for s in pack)
            squares = sum(s.length**2 for s in pack) + (512 - used) ** 2
            costs.append(3 * 512 + 500 * sum(s.tiles for s in pack) + squares)
        steps = np.array(costs[: len(costs) // 4 * 4]).reshape(-1, 4)
        return float(steps.mean() / steps.max(axis=1).mean())

    assert efficiency(mixed) < 0.9
    assert efficiency(aligned) > 0.97
    pairs = plan(3000, window=1000, epochs=1.0, run=2)
    assert efficiency(mixed) < efficiency(pairs) < efficiency(aligned)
    assert names(everything(pairs)) == names(everything(mixed))
    assert sum(len(t) for t in aligned.rounds()) == sum(len(t) for t in mixed.rounds())


def test_a_mark_leads_to_the_same_packs_without_planning_what_came_before() -> None:
    straight = plan()
    whole = straight.packs(0, 900)
    fingerprint = straight.fingerprint()
    for number in (0, 63, 64, 500, 899):
        text = write_mark(straight.mark(number), fingerprint)
        mark = read_mark(text, fingerprint)
        assert isinstance(mark, Mark)
        assert number - 4 * 64 < mark.first_pack <= number
        resumed = plan()
        resumed.remember(mark)
        before = sum(mark.drawn)
        assert resumed[number] == whole[number]
        planned = sum(resumed._state.drawn) - before
        assert 0 < planned <= 5 * 200, "only the windows of one round are planned"
        assert resumed.packs(number, 900) == whole[number:]
        if number:
            assert resumed.packs(0, 40) == whole[:40], "what came before can still be asked for"


def test_marks_of_other_plans_are_ignored() -> None:
    made = plan()
    text = write_mark(made.mark(0), made.fingerprint())
    assert read_mark(text, plan(seed=4).fingerprint()) is None
    assert read_mark(text[:-9], made.fingerprint()) is None
    broken = {**json.loads(text), "pool": [[1]]}
    assert read_mark(json.dumps(broken), made.fingerprint()) is None


def test_the_fingerprint_changes_with_the_order_of_packs() -> None:
    prints = {
        made.fingerprint()
        for made in (
            plan(),
            plan(seed=4),
            plan(batch=8),
            plan(run=2),
            plan(window=201),
            plan(cost=PackCost(3, 501, 1)),
            plan(598),
            plan(epochs=1.0),
            plan(limits=PackLimits(512, 40)),
            plan(when_source_ends=SourceEnd.stop),
        )
    }
    assert len(prints) == 10
    assert plan().fingerprint() == plan().fingerprint()


def test_memory_stays_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_room, "KEPT_MARKS", 16)
    made = plan()
    whole = made[0]
    for number in range(0, 64 * 90, 64):
        made[number]
    assert len(made._rounds) <= plan_room.KEPT_ROUNDS
    assert len(made._marks) <= 16
    assert made[0] == whole
    assert made[64 * 41 + 5] == plan()[64 * 41 + 5]


def test_packing_off_gives_one_sample_each() -> None:
    packs = plan(30, packing=False, window=7, epochs=1.0).packs(0, 45)
    assert [len(pack) for pack in packs] == [1] * 45
    assert set(names(packs).values()) == {1}


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="window is 0"):
        plan(window=0)
    with pytest.raises(ValueError, match="batch is 0"):
        plan(batch=0)
    with pytest.raises(ValueError, match="from 0"):
        plan()[-1]
