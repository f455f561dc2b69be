"""What a rank does in the resume tests: a whole stage of a run, as `mvl train` does it."""

from pathlib import Path

from megatron_vl.config.load import load_stage
from megatron_vl.engine import process_groups
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.receipt import now
from megatron_vl.train.main import Clock, Loop
from megatron_vl.train.start import start_stage


def run_stage(run_path: Path, name: str) -> tuple[int, str]:
    """Start a stage from what is on disk, run it to its receipt; the first step, what it said."""
    run = RunFolder(run_path)
    stage = run.stage(name)
    config = load_stage(stage.config_path)
    groups = process_groups.create(config.parallel, config.train.seed)
    start = start_stage(config, run, stage, groups)
    loop = Loop(config, run, stage, start, Clock())
    loop.run(attempt=1)
    loop.finish(attempt=1, started=now())
    return start.step, start.said
