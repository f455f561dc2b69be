"""`mvl train`: what each rank of a job runs. The only command that needs the whole environment.

Listens for signals before it loads its packages. Under Slurm (MVL_WORLD=slurm, set by the job's
script) rank and world size are those of the `srun` task.
"""

import os
from argparse import Namespace
from pathlib import Path

from launch import exit_codes
from launch.local import end_with_parent
from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import RunError, RunFolder
from megatron_vl.run.stop import StopRequest

_SLURM_NAMES = {
    "RANK": "SLURM_PROCID",
    "LOCAL_RANK": "SLURM_LOCALID",
    "WORLD_SIZE": "SLURM_STEP_NUM_TASKS",
}


def main(args: Namespace) -> int:
    """Train one stage of a run as one rank; the trainer on rank 0 writes the receipt.

    Started by `mvl submit`; by hand, as one rank, it makes a new attempt.
    """
    stop = StopRequest.from_environment()
    stop.listen()
    end_with_parent()
    in_slurm = os.environ.get("MVL_WORLD") == "slurm"
    if in_slurm:
        os.environ |= {name: os.environ[task] for name, task in _SLURM_NAMES.items()}
    config = load_stage(args.config, args.overrides)
    run = RunFolder(args.run)
    if not run.exists():
        raise RunError(
            f"{run.path}: not a run folder; `mvl submit RECIPE --run {run.path}` makes one and "
            "trains it"
        )
    stage = run.stage(config.name)
    if stage.config_path.resolve() != Path(args.config).resolve() or args.overrides:
        raise RunError(
            f"{args.config} is not the configuration this run was planned with; train "
            f"{stage.config_path}, or submit the recipe again with your changes"
        )
    from megatron_vl.train.main import train_stage

    supervised = os.environ.get("MVL_ATTEMPT")
    attempt = int(supervised) if supervised else stage.start_attempt()
    status = train_stage(config, run, stage, attempt, stop)
    # srun kills the other ranks, one of them writing the receipt, when a rank exits with a code.
    return exit_codes.OK if in_slurm else exit_codes.BY_STATUS[status]
