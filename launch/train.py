"""`mvl train`: what each rank of a job runs. The only command that needs the whole environment."""

import os
from argparse import Namespace
from pathlib import Path

from launch.local import end_with_parent
from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import RunError, RunFolder


def main(args: Namespace) -> int:
    """Train one stage of a run as one rank; the trainer on rank 0 writes the receipt.

    Started by `mvl submit`; by hand, as one rank, it makes a new attempt.
    """
    end_with_parent()
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
    return train_stage(config, run, stage, attempt)
