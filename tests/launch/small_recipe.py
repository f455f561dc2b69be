"""A recipe of two stages and small programs that stand where a trainer would.

The programs use the same run folder calls as the trainer, so what is tested here is the supervisor.
"""

import sys
from pathlib import Path

from launch.local import CommandBuilder, RankCommand
from megatron_vl.config.schema_node import Work
from megatron_vl.run.folder import RunFolder, StageFolder

DRAWN = Path(__file__).parents[1] / "support" / "stages" / "init.yaml"
LAPTOP = Path(__file__).parents[2] / "stages" / "laptop"

FINISHES = """
import os, sys
from megatron_vl.run.digest import checkpoint_digest
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import append_metrics
from megatron_vl.run.receipt import CheckpointRef, ParentRef, Receipt, Seconds, now
run = RunFolder(sys.argv[1]); stage = run.stage(sys.argv[2]); attempt = int(sys.argv[3])
entry = next(entry for entry in run.plan()["stages"] if entry["name"] == stage.name)
for step in range(1, entry["steps"] + 1):
    append_metrics(stage.metrics_path, dict(step=step, loss=5.0 / step, lr=1e-3, grad_norm=1.0,
        tokens=512, samples=8, tokens_per_s=100.0, tflops=0.1, mfu=0.1, hfu=0.1,
        seconds=0.1, data_wait_s=0.0, save_stall_s=0.0, bubble=None))
append_metrics(stage.metrics_path, dict(eval="val", step=step, loss=1.25))
append_metrics(stage.metrics_path, dict(eval="init", step=step, loss=3.5, sources=dict(qa=1.75),
    modalities=dict(image=2.25)))
folder = stage.checkpoints / "last"; folder.mkdir(parents=True, exist_ok=True)
(folder / "weights").write_text(stage.name)
parent = run.parent(stage)
before = parent.receipt() if parent else None
stage.write_receipt(Receipt(run=run.name, stage=stage.name, status="done", reason="all steps taken",
    step=step, attempts=attempt, checkpoint=CheckpointRef("checkpoints/last",
    checkpoint_digest(folder)), parent=ParentRef(before.stage, before.checkpoint.digest) if before
    else None, config_hash=entry["config_hash"], data_cursor=step, trainable=["decoder"],
    started=now(), ended=now(), seconds=Seconds(useful=1.0), metrics={"goodput": 0.73}))
print("finished", stage.name)
"""
FAILS = "import sys; print('the disk is on fire'); sys.exit(7)"
SLEEPS = "import time; print('asleep', flush=True); time.sleep(60)"
SILENT = "pass"


def write_recipe(folder: Path, steps: int = 2) -> Path:
    """A recipe folder with the stages init and stage0."""
    folder.mkdir(parents=True, exist_ok=True)
    for base in (DRAWN, LAPTOP / "stage0.yaml"):
        (folder / base.name).write_text(f"base: {base}\ntrain: {{steps: {steps}}}\n")
    return folder


def programs(**by_stage: str | list[str]) -> CommandBuilder:
    """A command builder: the program of each rank of each stage; stages not named finish."""

    def build(run: RunFolder, stage: StageFolder, work: Work, attempt: int) -> list[RankCommand]:
        chosen = by_stage.get(stage.name, FINISHES)
        texts = [chosen] if isinstance(chosen, str) else chosen
        folder = stage.attempt_path(attempt)
        return [
            RankCommand(
                [sys.executable, "-c", text, str(run.path), stage.name, str(attempt)],
                {"RANK": str(rank)},
                folder / f"rank_{rank}.log",
            )
            for rank, text in enumerate(texts)
        ]

    return build
