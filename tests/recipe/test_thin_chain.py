"""init and stages 0-4 in one command: what the run folder says, and what the weights say."""

import json
import math
import shutil

import pytest
import torch

from megatron_vl.config.load import load_stage
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import eval_lines, read_metrics, set_lines, step_lines
from megatron_vl.train.checkpoint import full_tensors
from tests.conftest import LAPTOP, ShortRun, mvl

STAGES = ["init", "stage0", "stage1", "stage2", "stage3", "stage4"]


def test_every_stage_is_done_and_starts_from_the_one_before(short_run: ShortRun) -> None:
    run = RunFolder(short_run.path)
    left_out = ["qad_fp8", "qad_nvfp4", "release"]
    assert [stage.name for stage in run.stages()] == [*STAGES, *left_out]
    before = None
    for stage in run.stages()[: len(STAGES)]:
        receipt = stage.receipt()
        assert receipt is not None
        assert receipt.done
        assert receipt.config_hash
        if stage.name != "init":
            assert receipt.step == 3
            assert receipt.data_cursor == 6
        assert receipt.checkpoint is not None
        assert checkpoint_digest(stage.checkpoint_path(receipt)) == receipt.checkpoint.digest
        if before is None:
            assert receipt.parent is None
        else:
            assert receipt.parent is not None
            assert (receipt.parent.stage, receipt.parent.digest) == before
        before = (stage.name, receipt.checkpoint.digest)


def test_metrics_follow_the_contract(short_run: ShortRun) -> None:
    for stage in short_run.trained:
        records = read_metrics(stage.metrics_path)
        assert [line["step"] for line in step_lines(records)] == [1, 2, 3]
        for line in step_lines(records):
            assert math.isfinite(line["loss"])
            assert line["grad_norm"] > 0
            assert line["tokens_per_s"] > 0
            assert line["tflops"] > 0
        assert [line["step"] for line in eval_lines(records)] == [0, 3]
        assert list(stage.tensorboard.glob("events.out.tfevents.*"))


def test_every_stage_looks_at_every_stages_set(short_run: ShortRun) -> None:
    trained = STAGES[1:]
    for stage in short_run.trained:
        lines = {line["eval"]: line for line in set_lines(read_metrics(stage.metrics_path))}
        assert list(lines) == trained
        receipt = stage.receipt()
        assert receipt is not None
        for name in trained:
            said = receipt.metrics
            assert said[f"eval/{name}"] == lines[name]["loss"]
            for kind in ("source", "modality"):
                told = {
                    key.rpartition("/")[2]: value
                    for key, value in said.items()
                    if key.startswith(f"eval/{name}/{kind}/")
                }
                losses = lines[name]["sources" if kind == "source" else "modalities"]
                assert told == losses
                assert min(losses.values()) <= said[f"eval/{name}"] <= max(losses.values())
        assert set(lines["stage3"]["modalities"]) == {"text"}
        assert set(lines["stage0"]["modalities"]) == {"image"}
        assert set(lines["stage3"]["sources"]) == {"code"}


def test_journal_tells_the_order(short_run: ShortRun) -> None:
    events = [
        (event["stage"], event["event"])
        for event in RunFolder(short_run.path).journal.read()
        if event["event"] in ("started", "saved", "ended")
    ]
    expected = [(stage, what) for stage in STAGES for what in ("started", "saved", "ended")]
    expected.remove(("init", "saved"))  # it is put together, not trained
    assert events == expected


def _weights(short_run: ShortRun, name: str) -> dict[str, torch.Tensor]:
    stage = RunFolder(short_run.path).stage(name)
    receipt = stage.receipt()
    assert receipt is not None
    return full_tensors(stage.checkpoint_path(receipt))


def test_stage0_changes_the_projector_and_nothing_else(short_run: ShortRun) -> None:
    before, after = _weights(short_run, "init"), _weights(short_run, "stage0")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.startswith("vision_projection.")}
    assert len(changed) == 3


def test_stage1_changes_every_part(short_run: ShortRun) -> None:
    before, after = _weights(short_run, "stage0"), _weights(short_run, "stage1")
    same = {name for name in before if torch.equal(before[name], after[name])}
    assert same == set()


def test_submitting_again_runs_nothing(short_run: ShortRun) -> None:
    run = RunFolder(short_run.path)
    stages = run.stages()[: len(STAGES)]
    receipts = [stage.receipt_path.read_text() for stage in stages]
    words = [*short_run.selection, *short_run.overrides]
    mvl("submit", str(LAPTOP), "--run", str(short_run.path), "--follow", *words)
    assert [stage.receipt_path.read_text() for stage in stages] == receipts
    assert all(stage.last_attempt() == 1 for stage in stages)


def test_a_changed_setting_of_a_done_stage_is_refused(short_run: ShortRun) -> None:
    done = mvl(
        "submit", str(LAPTOP), "--run", str(short_run.path), *short_run.selection,
        *short_run.overrides, "optimizer.lr=0.5", check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert "optimizer.lr" in done.stdout


def test_a_stage_does_not_start_from_a_tampered_parent(
    short_run: ShortRun, tmp_path_factory: pytest.TempPathFactory
) -> None:
    copy = tmp_path_factory.mktemp("tampered") / "run"
    shutil.copytree(short_run.path, copy)
    run = RunFolder(copy)
    stage0 = run.stage("stage0")
    receipt = stage0.receipt()
    assert receipt is not None
    shard = next(stage0.checkpoint_path(receipt).glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run.stage("stage1").receipt_path.unlink()
    done = mvl(
        "submit", str(LAPTOP), "--run", str(copy), "--follow", "--until", "stage1",
        *short_run.overrides, check=False,
    )  # fmt: skip
    assert done.returncode == 4
    assert "digest" in done.stdout
    assert run.stage("stage1").last_attempt() == 1


def test_status_logs_and_report(short_run: ShortRun) -> None:
    status = json.loads(mvl("status", str(short_run.path), "--json").stdout)
    assert "done" in json.dumps(status)
    logs = mvl("logs", str(short_run.path), "stage1").stdout
    assert "starts from stage0 step 3" in logs
    mvl("report", str(short_run.path))
    page = (short_run.path / "report.html").read_text()
    for stage in STAGES:
        assert stage in page


def test_generate_answers_about_a_held_out_image(short_run: ShortRun) -> None:
    shown = mvl(
        "generate", str(short_run.path), "--held-out", "qa", "--count", "1",
        "--max-new-tokens", "4",
    ).stdout  # fmt: skip
    assert "held-out answer" in shown
    line = (short_run.path / "generate.jsonl").read_text().splitlines()[-1]
    record = json.loads(line)
    assert (short_run.path / record["image"]).stat().st_size > 0
    assert record["prompt"]
    assert record["reference"]


def test_the_resolved_config_is_the_recipe_with_the_overrides(short_run: ShortRun) -> None:
    stage = RunFolder(short_run.path).stage("stage1")
    assert load_stage(stage.config_path) == load_stage(
        LAPTOP / "stage1.yaml", list(short_run.overrides)
    )
