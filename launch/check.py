"""`mvl check`: a layout against one rank, before a cluster is spent on it.

The stage is made shallow (same widths, layout and precision), trained for two steps on synthetic
packs by the ranks of the layout and by one rank, and the two are compared layer by layer and
gradient by gradient. In precisions below float32 a third run, one rank in float32, says how much
the precision itself costs. All ranks run on this machine: processes on a CPU, one GPU each where
there are GPUs. Needs no data on disk.
"""

import json
import shutil
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from launch import exit_codes
from launch.local import RankCommand, RankGroup, end_with_parent, rank_environment
from launch.tables import print_table
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.config.schema import ParallelConfig, Precision, StageConfig
from megatron_vl.config.shorten import shorten

MOST_RANKS = 64
"""Processes of one machine; a layout of more ranks is checked with smaller axes."""


def main(args: Namespace) -> int:
    """Run the layout and one rank, compare, say where they part."""
    config = shorten(
        load_stage(args.file, args.overrides),
        layers=args.layers,
        encoder_layers=args.encoder_layers,
    )
    parallel = config.parallel
    if parallel.ranks > MOST_RANKS:
        raise ConfigError(
            f"the layout has {parallel.ranks} ranks, a check runs at most {MOST_RANKS} on this "
            f"machine; lower an axis, as in parallel.data=1 parallel.tensor={parallel.tensor}"
        )
    if parallel.ranks == 1:
        raise ConfigError(
            "the layout has one rank, which is what layouts are compared with; set an axis, as in "
            "parallel.tensor=2"
        )
    config.train.global_batch = parallel.data
    with tempfile.TemporaryDirectory(prefix="mvl-check-") as scratch:
        runs = _runs(config, Path(scratch))
        for name, stage in runs.items():
            if not args.json:
                print(f"{_described(name, stage)} ...", flush=True)
            failure = _run(Path(scratch) / name, stage)
            if failure:
                print(failure, file=sys.stderr)
                return exit_codes.FAILED
        from megatron_vl.train.compare import findings

        exact = Path(scratch) / "float32"
        found = findings(
            Path(scratch) / "layout",
            Path(scratch) / "one_rank",
            exact if exact.is_dir() else None,
        )
    off = [finding for finding in found if not finding.holds]
    if args.json:
        print(json.dumps({"equal": not off, "findings": [asdict(one) for one in found]}))
    else:
        _print(found, every=args.all)
    return exit_codes.FOUND if off else exit_codes.OK


def rank(args: Namespace) -> int:
    """What each rank of a check runs."""
    end_with_parent()
    config = load_stage(args.file, [])
    import torch

    from megatron_vl.engine import process_groups
    from megatron_vl.train.record import record

    if config.train.threads:
        torch.set_num_threads(config.train.threads)
    process_groups.join_world()
    try:
        record(config, Path(args.record))
    finally:
        process_groups.leave_world()
    return exit_codes.OK


def _runs(config: StageConfig, scratch: Path) -> dict[str, StageConfig]:
    """The stages to run, by the name of their folder; each is written there."""
    from copy import deepcopy

    runs = {"layout": config, "one_rank": deepcopy(config)}
    runs["one_rank"].parallel = ParallelConfig()
    if config.precision is not Precision.fp32:
        runs["float32"] = deepcopy(runs["one_rank"])
        runs["float32"].precision = Precision.fp32
    for name, stage in runs.items():
        folder = scratch / name
        folder.mkdir()
        (folder / "stage.yaml").write_text(to_yaml(stage), encoding="utf-8")
    return runs


def _described(name: str, stage: StageConfig) -> str:
    parallel = stage.parallel
    axes = ("tensor", "pipeline", "context", "data")
    split = " ".join(f"{axis}={getattr(parallel, axis)}" for axis in axes) + (
        " sequence" if parallel.sequence else ""
    )
    ranks = "1 rank" if parallel.ranks == 1 else f"{parallel.ranks} ranks, {split}"
    what = f"{stage.model.decoder.pattern} in {stage.precision.value}"
    return f"{name.replace('_', ' ')}: {what} on {ranks}"


def _run(folder: Path, stage: StageConfig) -> str:
    """Run the ranks of one record; what the first that failed said, or nothing."""
    shared = rank_environment(stage.parallel.ranks, stage.train.threads)
    argv = [sys.executable, "-m", "launch.cli", "check-rank", str(folder / "stage.yaml")]
    argv += ["--record", str(folder)]
    commands = [
        RankCommand(argv, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, folder / f"{r}.log")
        for r in range(stage.parallel.ranks)
    ]
    with RankGroup(commands) as group:
        result = group.wait()
    if result.first_failed is None:
        return ""
    said = (folder / f"{result.first_failed}.log").read_text(encoding="utf-8", errors="replace")
    kept = Path(tempfile.mkdtemp(prefix="mvl-check-log-"))
    shutil.copytree(folder, kept, dirs_exist_ok=True)
    return "\n".join([*said.splitlines()[-12:], f"rank {result.first_failed} failed; logs: {kept}"])


def _print(found: Sequence, *, every: bool) -> None:
    """The table, and the first tensor beyond its bound by name."""
    off = [finding for finding in found if not finding.holds]
    shown = [f for f in found if every or not f.holds or not f.name.startswith("gradient.")]
    worst = max(
        (f for f in found if f.name.startswith("gradient.")), key=lambda f: f.difference / f.bound
    )
    if worst not in shown:
        shown.append(worst)
    rows = [
        (f.name, f"{f.difference:.1e}", f"{f.bound:.1e}", "equal" if f.holds else "differs")
        for f in shown
    ]
    names = ("tensor", "difference", "allowed", "")
    print_table("", names, rows, left=1, styles={"differs": "red", "equal": "green"})
    if off:
        print(f"the layout differs from one rank, first in {off[0].name}")
    else:
        print(f"the layout computes what one rank computes ({len(found)} tensors compared)")
