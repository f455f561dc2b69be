"""Nodes of a recipe that do not train: what runs between and behind its stages, as one process."""

import sys
from pathlib import Path


def node_arguments(run: Path, stage: str) -> list[str]:
    """What a node's process runs, as arguments of the interpreter."""
    return ["-m", "launch.cli", "node", stage, "--run", str(run)]


def node_command(run: Path, stage: str) -> list[str]:
    """The same as a command of this machine."""
    return [sys.executable, *node_arguments(run, stage)]
