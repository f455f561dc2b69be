"""A recipe with branches, an evaluation and its gate, whose stages are small programs.

The evaluation measures how long the name of its stage is: as a real node (`mvl node`, which runs
`mvl evaluate --command`, which runs a program), or as a small program too, which is quicker.
"""

import sys
from pathlib import Path

from launch.local import CommandBuilder, RankCommand, rank_commands
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import Work
from megatron_vl.run.folder import RunFolder, StageFolder
from tests.launch.small_recipe import DRAWN, LAPTOP, programs

# The metric is the length of the checkpoint's file: the small programs write their stage's name.
MEASURE = (
    "import json, pathlib, sys; text = (pathlib.Path(sys.argv[1]) / 'weights').read_text(); "
    "json.dump({'name.length': len(text)}, open(sys.argv[2], 'w'))"
)

MEASURES = """
import os, sys
from megatron_vl.config.load import config_hash
from megatron_vl.config.load_node import load_node
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.receipt import ParentRef, Receipt, now
run = RunFolder(sys.argv[1]); stage = run.stage(sys.argv[2]); attempt = int(sys.argv[3])
(source,) = run.sources(stage).values()
before = source.receipt()
text = (source.checkpoint_path(before) / "weights").read_text()
stage.write_receipt(Receipt(run=run.name, stage=stage.name, status="done",
    reason="measured 1 metrics of " + source.name, step=0, attempts=attempt, checkpoint=None,
    parent=ParentRef(source.name, before.checkpoint.digest),
    config_hash=config_hash(load_node(stage.node_path)), data_cursor=None, trainable=[],
    started=now(), ended=now(), metrics={"name.length": len(text)}, kind="evaluate",
    inputs={source.name: before.checkpoint.digest}))
"""


def write_node_recipe(folder: Path, gate: str = "", steps: int = 2, **files: str) -> Path:
    """init, stage0, an evaluation `check` of stage0 with a gate, stage1 after it.

    `files` are further files by name, or others in place of these; an empty text leaves one out.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "measure.py").write_text(MEASURE)
    texts = {
        "init": stage("init"),
        "stage0": stage("stage0"),
        "check": evaluation("check", "stage0") + gate,
        "stage1": stage("stage1", "after: check"),
    }
    for name, text in {**texts, **files}.items():
        if text:
            text = text.replace("FOLDER", str(folder)).replace("STEPS", str(steps))
            (folder / f"{name}.yaml").write_text(text)
    return folder


def evaluation(name: str, after: str) -> str:
    """The text of an evaluation's file; FOLDER is where the recipe lies."""
    command = f"{sys.executable} FOLDER/measure.py {{checkpoint}} {{results}}"
    return f"node: evaluate\nname: {name}\nafter: {after}\ncommand: {command!r}\n"


def stage(name: str, *lines: str) -> str:
    """The text of a training stage's file; STEPS is how long it is."""
    base = (
        DRAWN if name == "init" else LAPTOP / ("stage0.yaml" if name == "stage0" else "stage1.yaml")
    )
    return "\n".join([f"base: {base}", f"name: {name}", "train: {steps: STEPS}", *lines, ""])


def real_nodes(**by_stage: str | list[str]) -> CommandBuilder:
    """A command builder: programs stand for the training stages, nodes run as they are."""
    return _builder(rank_commands, programs(**by_stage))


def quick_nodes(**by_stage: str | list[str]) -> CommandBuilder:
    """The same with a small program for evaluations too."""
    stages = programs(**by_stage)

    def measures(run: RunFolder, stage: StageFolder, work: Work, attempt: int) -> list[RankCommand]:
        return programs(**{stage.name: MEASURES})(run, stage, work, attempt)

    return _builder(measures, stages)


def _builder(nodes: CommandBuilder, stages: CommandBuilder) -> CommandBuilder:
    def build(run: RunFolder, stage: StageFolder, work: Work, attempt: int) -> list[RankCommand]:
        make = stages if isinstance(work, StageConfig) else nodes
        return make(run, stage, work, attempt)

    return build
