"""The laptop recipe uses the whole data side: what receipts, ledgers and configs say."""

import json
import re
from pathlib import Path

import pytest
import yaml

from launch.cli import main
from megatron_vl.config.load import load_stage
from megatron_vl.data.ledger import digest_of, lineage, read_lines
from megatron_vl.data.loader import PackLoader
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import read_metrics, step_lines
from tests.conftest import ShortRun, mvl


def test_receipts_tell_what_was_used(short_run: ShortRun) -> None:
    for stage in short_run.trained:
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


def test_receipts_tell_of_pictures_and_pruned_clips(short_run: ShortRun) -> None:
    said = {
        stage.name: stage.receipt().metrics  # type: ignore[union-attr]
        for stage in short_run.trained
    }
    assert said["stage2"]["data/samples"]["clips"] > 0
    assert said["stage2"]["data/pruned_videos"] > 0
    assert all(said[stage]["data/units"] > 0 for stage in ("stage0", "stage1", "stage2"))
    assert said["stage3"]["data/units"] == said["stage4"]["data/pruned_videos"] == 0
    seen = {source for metrics in said.values() for source in metrics["data/samples"]}
    assert seen == {"captions", "ocr", "qa", "clips", "text", "code", "long_text"}


def test_the_command_lists_the_samples_of_a_step(short_run: ShortRun) -> None:
    stage = RunFolder(short_run.path).stage("stage1")
    line = lineage(stage.path / "data.jsonl")[1]
    done = mvl("data", "ledger", str(short_run.path), "stage1", "--step", "2")
    rows = [json.loads(row) for row in done.stdout.splitlines()]
    assert len(rows) == line["samples"]
    assert {row["step"] for row in rows} == {2}
    assert {row["pack"] for row in rows} == set(range(*line["packs"]))
    assert digest_of((row["source"], row["key"], row["epoch"]) for row in rows) == line["ids"]
    done = mvl("data", "ledger", str(short_run.path), "stage1", "--step", "9", check=False)
    assert done.returncode == 2
    assert "tells of no step 9" in done.stdout


def test_a_page_shows_the_packs_of_a_step(
    short_run: ShortRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, page = str(short_run.path), tmp_path / "step.html"
    assert main(["data", "ledger", run, "stage0", "--step", "2"]) == 0
    rows = [json.loads(row) for row in capsys.readouterr().out.splitlines()]
    assert main(["data", "show", run, "stage0", "--step", "2", "--out", str(page)]) == 0
    html = page.read_text()
    shown = re.findall(r'<article id="([^"]+)">.*?<dt>pack</dt><dd>(\d+)</dd>', html, re.DOTALL)
    assert shown == [(row["key"], str(row["pack"])) for row in rows]
    assert html.count("<figure>") == len(rows) > 0  # stage 0 is pictures throughout
    line = step_lines(read_metrics(short_run.trained[0].metrics_path))[1]
    assert f"loss {line['loss']:.4f}" in capsys.readouterr().out
    assert f"loss {line['loss']:.4f}" in html
    assert main(["data", "show", run, "--step", "9"]) == 2
    assert "tells of no step 9" in capsys.readouterr().err


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
    for stage in short_run.trained:
        data = yaml.safe_load(stage.config_path.read_text())["data"]
        assert data["blend_file"] == ""
        assert data["blend"]
        units.add(data["blend_unit"])
        ends.add((data["when_source_ends"], bool(data["epochs"])))
        limits.add((data["max_tiles_per_pack"] > 0, data["max_samples_per_pack"] > 0))
    assert units == {"samples", "tokens"}
    assert ("stop", True) in ends
    assert (True, True) in limits
