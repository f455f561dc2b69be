"""What a rank does in the tests of stopping: a stage that one rank is asked to leave."""

import time
from pathlib import Path

import torch.distributed

from megatron_vl.config.load import load_stage
from megatron_vl.engine import process_groups
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.receipt import now
from megatron_vl.run.stop import Stop, StopRequest
from megatron_vl.train.main import Clock, Loop
from megatron_vl.train.start import start_stage


class AskedBefore(StopRequest):
    """Asked before a step, on one rank alone; a rank looks once before its first evaluation too."""

    def __init__(self, step: int, rank: int, what: Stop) -> None:
        super().__init__()
        self.step, self.rank, self.what = step, rank, what
        self.looks = -1

    def look(self, save_seconds: float | None, step_seconds: float) -> Stop:
        self.looks += 1
        mine = torch.distributed.get_rank() == self.rank and self.looks >= self.step
        return self.what if mine else Stop.none


def run_until_asked(run_path: Path, name: str, step: int, rank: int, what: str) -> tuple[int, str]:
    """Run a stage that one rank is asked to leave before its n-th step here (0: never).

    Returns:
        The step this rank left at, and how it was asked.
    """
    run = RunFolder(run_path)
    stage = run.stage(name)
    config = load_stage(stage.config_path)
    groups = process_groups.create(config.parallel, config.train.seed)
    start = start_stage(config, run, stage, groups)
    stop = AskedBefore(step, rank, Stop[what]) if step else StopRequest()
    if what == "time_limit" and not step:
        stop = StopRequest(job_end=time.time() + 3600, lead_seconds=60)
    loop = Loop(config, run, stage, start, Clock(), stop)
    asked = loop.run(attempt=1)
    if asked is Stop.none:
        loop.finish(attempt=1, started=now())
    else:
        loop.leave(attempt=1, started=now(), asked=asked)
    return loop.step, asked.name
