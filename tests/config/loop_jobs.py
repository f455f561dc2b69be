"""What a rank does in the test of the loop's keys: a stage of two steps, and what it shows."""

import json
from pathlib import Path
from typing import Any

import torch

from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import read_metrics
from megatron_vl.train import main as loop_room
from megatron_vl.train import saves as saves_room
from megatron_vl.train.checkpoint import read_state


def loop_facts(file: Path, overrides: list[str], folder: Path) -> dict[str, Any]:
    """Run the stage alone in a run of its own; every fact is of one key's doing."""
    config = load_stage(file, overrides)
    run = RunFolder(folder)
    run.create({"run": "run", "stages": [{"name": config.name, "folder": "00_init"}]})
    stage = run.stage(config.name)
    stage.config_path.write_text(to_yaml(config))
    asked: dict[str, Any] = {}
    plain, threads = saves_room.Saver, torch.get_num_threads()
    groups = loop_room.process_groups
    joins = groups.join_world, groups.leave_world

    class Told(plain):  # type: ignore[valid-type,misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            asked.update(kwargs)
            super().__init__(*args, **kwargs)

    saves_room.Saver = Told  # type: ignore[misc]
    # The pool's rank is in its world already and leaves it by itself.
    groups.join_world = groups.leave_world = lambda: None  # type: ignore[assignment]
    try:
        loop_room.train_stage(config, run, stage, stage.start_attempt())
        used = torch.get_num_threads()
    finally:
        saves_room.Saver = plain  # type: ignore[misc]
        groups.join_world, groups.leave_world = joins
        torch.set_num_threads(threads)
    lines = read_metrics(stage.metrics_path)
    evaluations = [line for line in lines if line.get("eval") == "val"]
    folders = sorted(path for path in stage.checkpoints.iterdir() if path.is_dir())
    state = read_state(folders[-1])
    return {
        "threads": used,
        "mfu": [line["mfu"] is None for line in lines if "mfu" in line],
        "drift": sum("drift" in json.dumps(line) for line in lines),
        "evaluations": [line["step"] for line in evaluations],
        "first_loss": evaluations[0]["loss"],
        "sets": sorted({line["eval"] for line in lines if "eval" in line} - {"val"}),
        "checkpoints": [path.name for path in folders],
        "last_optimizer": state.optimizer,
        "saver": {key: value for key, value in asked.items() if isinstance(value, bool)},
    }
