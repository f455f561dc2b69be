"""`mvl generate` and `mvl evaluate`: opens what the command line names and hands it over.

A checkpoint is opened by `megatron_vl.infer`, an exported folder by `checkpoint_tools`; which of
the two it is, the folder says (an exported one holds a config.json).
"""

import json
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from launch import exit_codes
from launch.checkpoint_commands import stage_file

if TYPE_CHECKING:
    from megatron_vl.infer.model import OpenModel

_EXPORTED = "config.json"


def generate(args: Namespace) -> int:
    """Answer questions."""
    if args.held_out:
        _check_data(Path(args.checkpoint), args.like)
    from megatron_vl.infer.generate import main

    return main(args, lambda path: open_any(path, args.like))


def evaluate(args: Namespace) -> int:
    """Write metrics of a model, of other tools' results, or of a command."""
    from megatron_vl.run.metrics_file import run_command, write_metrics
    from megatron_vl.run.result_files import merge, read_results

    if not args.checkpoint and (args.external or not args.results):
        raise ValueError("name a checkpoint or exported folder to measure, or --results to read")
    found: dict[str, float] = {}
    for file in args.results:
        found = merge(found, read_results(Path(file), args.reader), file)
    if args.external:
        written = run_command(args.external, Path(args.checkpoint), args.reader, args.timeout)
        found = merge(found, written, "--command")
    elif args.checkpoint:
        from megatron_vl.infer.evaluate import measure

        _check_data(Path(args.checkpoint), args.like)
        with open_any(Path(args.checkpoint), args.like) as model:
            print(f"opened {model.origin}", flush=True)
            measured = measure(model, args.suites, limit=args.limit)
        found = merge(found, measured, "the suites")
    write_metrics(Path(args.out), found)
    print(json.dumps(found, indent=1))
    return exit_codes.OK


def _check_data(path: Path, like: str | None) -> None:
    """Raise ValueError where held-out samples are wanted of a folder that names no data."""
    if like is None and (path / _EXPORTED).is_file():
        raise ValueError(
            f"{path} is an exported folder and has no data of its own; name a stage file whose "
            "data to ask about: --like STAGE.yaml"
        )


@contextmanager
def open_any(path: Path, like: str | None = None) -> "Iterator[OpenModel]":
    """A checkpoint or an exported folder, opened.

    Args:
        like: stage file whose data an exported folder is asked about.

    Raises:
        RunError, ConversionError, ConfigError: it is neither, or cannot be used.
        ValueError: nothing is there, a folder of several exports was named, or `like` is given for
            a checkpoint, which has a stage of its own.
    """
    if (path / _EXPORTED).is_file():
        from checkpoint_tools.open_export import open_export

        with open_export(path, stage_file(like) if like else None) as model:
            yield model
        return
    inside = sorted(str(found.parent) for found in path.glob(f"*/{_EXPORTED}"))
    if inside or not path.exists():
        what = (
            f"holds exported folders, name one: {', '.join(inside)}" if inside else "is not there"
        )
        raise ValueError(f"{path} {what}")
    if like is not None:
        raise ValueError(
            f"{path} is no exported folder; a checkpoint brings its own stage, leave --like out"
        )
    from megatron_vl.infer.model import open_model

    with open_model(path) as model:
        yield model
