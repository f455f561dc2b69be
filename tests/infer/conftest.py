"""A run on disk with one done stage of drawn weights, saved by a rank as the trainer saves."""

from pathlib import Path

import pytest
import torch

from megatron_vl.config.load import config_hash, load_stage, to_yaml
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.receipt import CheckpointRef, Receipt, now
from megatron_vl.train.checkpoint import LoopState
from megatron_vl.train.checkpoint_save import save
from tests.conftest import LAPTOP, SmallData
from tests.support.ranks import RankPool
from tests.train.jobs import drawn

STAGES = [("init", "00_init"), ("stage0", "01_stage0"), ("stage1", "02_stage1")]
DONE = "stage0"


def save_drawn(file: Path, overrides: list[str], folder: Path) -> None:
    """Draw weights, spread them so that answers vary, save without optimizer state."""
    trainee = drawn(load_stage(file, overrides))
    generator = torch.Generator().manual_seed(61)
    with torch.no_grad():
        for parameter in trainee.module.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    save(folder, trainee, LoopState("stage0", 7, 14, False, ["projector"]))


@pytest.fixture(scope="session")
def small_run(
    ranks: RankPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """init is done, stage0 is done at step 7, stage1 has failed with nothing saved."""
    run = RunFolder(tmp_path_factory.mktemp("runs") / "small")
    run.create({"stages": [{"name": name, "folder": folder} for name, folder in STAGES]})
    overrides = [small_data.override, "parallel.data=1", "data.sequence_length=160"]
    for stage in run.stages():
        # What init was made of matters to nobody here.
        file = "stage0" if stage.name == "init" else stage.name
        config = load_stage(LAPTOP / f"{file}.yaml", overrides)
        config.name = stage.name
        stage.config_path.write_text(to_yaml(config))
        done = stage.name != "stage1"
        if stage.name == DONE:
            folder = stage.checkpoints / "step_000007"
            ranks.run(1, save_drawn, LAPTOP / "stage0.yaml", overrides, folder)
        reference = CheckpointRef("checkpoints/step_000007", "0" * 64) if done else None
        stage.write_receipt(
            Receipt(
                run=run.name,
                stage=stage.name,
                status="done" if done else "failed",
                reason="made by a test",
                step=7,
                attempts=1,
                checkpoint=reference,
                parent=None,
                config_hash=config_hash(config),
                data_cursor=14,
                trainable=["projector"],
                started=now(),
                ended=now(),
            )
        )
    return run.path
