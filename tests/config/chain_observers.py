"""What can be seen of a stage in a chain: what it waits for, its gate's verdict, the sets it is
evaluated on, what it learns from a teacher. Each makes what it needs in a folder of its own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from launch import gates
from megatron_vl.config.load import config_hash, to_yaml
from megatron_vl.config.recipe import load_graph
from megatron_vl.config.schema import StageConfig
from megatron_vl.engine.meta import pretend_rank
from megatron_vl.engine.vocab_divergence import Target
from megatron_vl.engine.vocab_loss import Split
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.receipt import CheckpointRef, Receipt, now
from megatron_vl.train import distill
from megatron_vl.train.build import prepare_training
from megatron_vl.train.evaluate_sets import held_out_sets
from tests.config.observers import made_module
from tests.conftest import DRAWN, LAPTOP

MEASURED = {"init": 3.0, "stage0": 1.0, "stage1": 2.0}
"""What each stage of the made-up run measured as `loss`."""


def chain(config: StageConfig) -> Any:
    """What stage 1 waits for in a recipe of three stages."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        root = f"data: {{root: {config.data.root}}}\n"
        (folder / "init.yaml").write_text(f"base: {DRAWN}\n{root}")
        (folder / "stage0.yaml").write_text(f"base: {LAPTOP / 'stage0.yaml'}\n{root}")
        (folder / "stage1.yaml").write_text(to_yaml(config))
        return load_graph(folder).graph.parents["stage1"]


def verdict(config: StageConfig) -> Any:
    """What the stage's gate makes of fixed metrics, and which of two children may start."""
    with _run(config, *MEASURED, children=("stage2", "stage3")) as run:
        for name, loss in MEASURED.items():
            run.stage(name).write_receipt(_receipt(config, name, loss))
        with mock.patch.object(gates, "load_work", return_value=config):  # also what a file refuses
            receipt = gates.settle_gate(run, run.stage("stage1"))
        assert receipt is not None
        told = {key: receipt.gate.get(key) for key in ("decision", "checks", "open", "closed")}
        return receipt.status, receipt.reason, told


def sets(config: StageConfig) -> Any:
    """The sets of a run with longer packs before this stage."""
    with _run(config, "init", "stage1") as run:
        longer = replace(config.data, sequence_length=2 * config.data.sequence_length)
        run.stage("init").config_path.write_text(to_yaml(replace(config, name="init", data=longer)))
        run.stage("stage1").config_path.write_text(to_yaml(config))
        return sorted(held_out_sets(run, config))


def taught(config: StageConfig) -> Any:
    """How far a student is from its teacher, and on how many packs its scales are fixed."""
    with pretend_rank(config.parallel) as groups:
        trainee = prepare_training(made_module(config, groups), config, groups)
        with mock.patch.object(distill, "load_weights"):
            distill.prepare_distillation(trainee, config, Path("weights"))
        learned = trainee.distillation
        if learned is None:
            return None
        draws = torch.Generator().manual_seed(3)
        one_LBH, other_LBH = torch.randn(2, 5, 1, 8, generator=draws)
        weight_VH = torch.randn(16, 8, generator=draws)
        split = Split(groups.tp, False, 4)
        target = Target(one_LBH, weight_VH, learned.temperature)
        divergence_BL = target.divergence(other_LBH, weight_VH, split)
        with (
            mock.patch.object(distill, "evaluate_batch"),
            mock.patch.object(learned.student, "quantize") as quantized,
            mock.patch("megatron_vl.engine.input_amax.InputAmax.agreed"),
        ):
            distill.calibrate(trainee, config, cursor=0)
        return divergence_BL.tolist(), quantized.call_args.args[1]


@contextmanager
def _run(config: StageConfig, *names: str, children: tuple[str, ...] = ()) -> Iterator[RunFolder]:
    """A run folder of stages one after another, with further ones behind the last of them."""
    with tempfile.TemporaryDirectory() as place:
        run = RunFolder(Path(place))
        stages = [{"name": name, "folder": name} for name in names]
        stages += [{"name": name, "folder": name, "after": [names[-1]]} for name in children]
        run.create({"run": "run", "stages": stages})
        run.stage(names[-1]).config_path.write_text(to_yaml(config))
        yield run


def _receipt(config: StageConfig, name: str, loss: float) -> Receipt:
    return Receipt(
        run="run", stage=name, status="done", reason="all steps ran", step=2, attempts=1,
        checkpoint=CheckpointRef("checkpoints/last", "0" * 64), parent=None, data_cursor=2,
        config_hash=config_hash(config), trainable=[], started=now(), ended=now(),
        metrics={"loss": loss},
    )  # fmt: skip
