"""The laptop recipe uses the whole data side: what receipts, ledgers and configs say."""

import yaml

from megatron_vl.config.load import load_stage
from megatron_vl.data.ledger import lineage, read_lines
from megatron_vl.data.loader import PackLoader
from megatron_vl.run.folder import RunFolder
from tests.conftest import ShortRun


def test_receipts_tell_what_was_used(short_run: ShortRun) -> None:
    for stage in RunFolder(short_run.path).stages():
        receipt = stage.receipt()
        assert receipt is not None
        said = receipt.metrics
        assert (said["data/packer"], said["data/order"]) == ("best_fit", "aligned")
        assert 0.4 < said["data/fill"] <= 1
        assert (said["data/bad"], said["data/left_out"]) == (0, 0)
        config = load_stage(stage.config_path)
        assert set(said["data/samples"]) <= set(config.data.blend)
        steps = lineage(stage.path / "data.jsonl")
        assert [line["step"] for line in steps] == [1, 2, 3]
        assert [line["packs"] for line in steps] == [[0, 2], [2, 4], [4, 6]]
        assert sum(line["samples"] for line in steps) == sum(said["data/samples"].values())
        opened = [line for line in read_lines(stage.path / "data.jsonl") if "opened" in line]
        assert [line["opened"]["plan"] for line in opened] == [said["data/plan"]]
        assert (stage.path / "plan_mark.json").exists()
        assert not list(stage.path.glob("bad_samples.*"))


def test_the_ledger_follows_from_the_resolved_config_alone(short_run: ShortRun) -> None:
    for name in ("stage1", "stage4"):
        stage = RunFolder(short_run.path).stage(name)
        loader = PackLoader(load_stage(stage.config_path), split="train", rank=0, size=1)
        for line in lineage(stage.path / "data.jsonl"):
            record = loader.batch_record(line["packs"][0])
            assert (record.ids, record.samples, record.tokens) == (
                line["ids"],
                line["samples"],
                line["tokens"],
            )
        loader.close()


def test_configs_hold_their_blends_and_the_recipe_uses_every_kind(short_run: ShortRun) -> None:
    units, ends, limits = set(), set(), set()
    for stage in RunFolder(short_run.path).stages():
        data = yaml.safe_load(stage.config_path.read_text())["data"]
        assert data["blend_file"] == ""
        assert data["blend"]
        units.add(data["blend_unit"])
        ends.add((data["when_source_ends"], bool(data["epochs"])))
        limits.add((data["max_tiles_per_pack"] > 0, data["max_samples_per_pack"] > 0))
    assert units == {"samples", "tokens"}
    assert ("stop", True) in ends
    assert (True, True) in limits
