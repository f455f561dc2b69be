"""`mvl data`: make the data sets a recipe reads."""

from argparse import Namespace
from pathlib import Path

from launch import exit_codes


def prepare(args: Namespace) -> int:
    """Build the data of a recipe under its `data.root`, unless it is there already."""
    from megatron_vl.data.prepare import prepare_recipe

    root = prepare_recipe(
        Path(args.recipe),
        args.overrides,
        force=args.force,
        progress=lambda text: print(text, flush=True),
    )
    print(f"data is ready in {root}")
    return exit_codes.OK
