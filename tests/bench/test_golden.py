"""The committed golden files: the prefix trains again to the same losses, the tables are whole."""

import csv
import json

import pytest

from bench import golden


def rows(name: str) -> list[dict[str, str]]:
    with (golden.GOLDEN / name).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_prefix_trains_to_the_same_losses() -> None:
    known = json.loads((golden.GOLDEN / "prefix.json").read_text())["losses"]
    losses = golden.prefix()
    assert losses == pytest.approx(known, rel=1e-4)
    assert len(set(losses)) == golden.STEPS
    assert losses != pytest.approx(known[::-1], rel=1e-4)


def test_every_layout_is_in_the_table_and_computes_what_one_rank_does() -> None:
    table = rows("parity.csv")
    assert [row["layout"] for row in table] == list(golden.LAYOUTS)
    for row in table:
        assert row["equal"] == "True"
        assert float(row["losses"]) <= 1e-5
        assert float(row["gradients"]) <= 1e-4


def test_the_curves_are_of_this_recipe() -> None:
    from megatron_vl.config.load import load_stage

    stages = json.loads((golden.GOLDEN / "prefix.json").read_text())["data"]
    assert list(stages)[:5] == [f"stage{number}" for number in range(5)]
    for name in stages:
        config = load_stage(golden.STAGE.with_name(f"{name}.yaml"))
        steps = [int(row["step"]) for row in rows("curves.csv") if row["stage"] == name]
        assert steps == list(range(1, config.train.steps + 1))
    after_1, after_3 = (
        next(
            float(row["loss"])
            for row in rows("held_out.csv")
            if (row["after"], row["set"], row["kind"]) == (stage, "stage3", "all")
        )
        for stage in ("stage1", "stage3")
    )
    assert after_1 > after_3  # code, which stage 1 costs and stage 3 recovers
