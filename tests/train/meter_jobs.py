"""What ranks do in the meters' tests: a batch under the schedule's timers, steps of a stage."""

from pathlib import Path

from megatron_vl.config.load import load_stage
from megatron_vl.engine import process_groups
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.main import Clock, Loop
from megatron_vl.train.start import start_stage
from megatron_vl.train.step import count, run_batch
from megatron_vl.train.timers import COMPUTE, SCHEDULE, ScheduleTimers
from tests.support.gradients import batch
from tests.train.jobs import drawn


def compute_spans(
    file: Path, overrides: list[str], num_packs: int
) -> tuple[dict[str, int], float, float]:
    """How often each timer ran, and the seconds of compute and of the schedule."""
    config = load_stage(file, overrides)
    trainee = drawn(config)
    timers = trainee.module.config.timers = ScheduleTimers()
    packs = batch(config, ["text"] * num_packs)
    trainee.wrapped.train()
    run_batch(packs, count(packs, trainee), trainee, config, forward_only=False)
    spans = {name: len(timers(name).marks) // 2 for name in (SCHEDULE, *COMPUTE)}
    return spans, *timers.take()


def two_steps(run_path: Path, name: str, saved: float) -> None:
    """The first two steps of a stage as `mvl train` runs them, `saved` seconds of saves between."""
    run = RunFolder(run_path)
    stage = run.stage(name)
    config = load_stage(stage.config_path)
    groups = process_groups.create(config.parallel, config.train.seed)
    loop = Loop(config, run, stage, start_stage(config, run, stage, groups), Clock())
    loop._one_step()
    loop.saves.waited += saved
    loop._one_step()
    loop._close()
