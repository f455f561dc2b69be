"""`mvl doctor-node`: every node of a job is looked at before ranks are put on it.

One process on each node (one for each rank where the all-reduce is measured too) writes what it
found into the attempt's folder: Python and package versions, GPUs and their memory errors, free
disk, the rate of an all-reduce over all of them. What that comes to is read when the attempt
closes (`verdict.py`).

Refuses nothing. Costs a step of the job and a start of Python, for which it imports little; with
the all-reduce the time to load torch on every node.
"""

import json
import os
import shutil
import socket
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from launch import exit_codes
from launch.all_reduce import measure_all_reduce
from launch.gpus import read_gpus
from megatron_vl.run import atomic
from megatron_vl.run.versions import versions

FOLDER = "doctor"
"""In the attempt's folder: one file a process, and `NAME.well` beside those that found no fault."""
_PATIENCE = timedelta(seconds=120)


@dataclass
class NodeReport:
    """What one process found on its node."""

    node: str
    rank: int
    versions: dict[str, str]
    gpus: list[str] = field(default_factory=list)
    disk_gb: float = 0.0
    all_reduce_gb_s: float | None = None
    problems: list[str] = field(default_factory=list)
    """What is wrong on the node, and may be so on all."""
    broken: list[str] = field(default_factory=list)
    """What is wrong with this very node."""
    slow: str = ""
    """What is wrong between the nodes."""


def main(args: Namespace) -> int:
    """Examine this process's node; writes DIR/RANK.json, and DIR/RANK.well when all is well."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    report = NodeReport(
        os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        rank,
        versions(),
    )
    folder = Path(args.folder)
    path = folder / f"{rank}.json"
    if os.environ.get("SLURM_LOCALID", "0") == "0":
        _look(report, args.gpus, args.least_disk_gb, folder)
    _write(path, report)
    if args.all_reduce:
        # Also from a sick node: the others wait for it.
        report.all_reduce_gb_s = _all_reduce(rank)
        if report.all_reduce_gb_s < args.least_gb_s:
            report.slow = (
                f"an all-reduce over the job's nodes runs at {report.all_reduce_gb_s:.2f} GB/s, "
                f"doctor.least_gb_s of the site is {args.least_gb_s:g}"
            )
        _write(path, report)
    said = [*report.broken, *report.problems, *[report.slow] * bool(report.slow)]
    for problem in said:
        print(f"{report.node}: {problem}", flush=True)
    if said:
        return exit_codes.FOUND
    path.with_suffix(".well").touch()
    return exit_codes.OK


def _look(report: NodeReport, gpus: int, least_disk_gb: float, folder: Path) -> None:
    """GPUs, their memory errors, and the disk that the run folder is on."""
    report.disk_gb = round(shutil.disk_usage(folder).free / 1e9, 1)
    if report.disk_gb < least_disk_gb:
        report.problems.append(
            f"{report.disk_gb} GB are free in the run folder, doctor.least_disk_gb of the site is "
            f"{least_disk_gb:g}"
        )
    if not gpus:
        return
    found, said = read_gpus()
    report.gpus = [gpu.name for gpu in found]
    if len(found) < gpus:
        seen = f"nvidia-smi lists {len(found)} GPUs of {gpus}"
        report.problems.append(f"{seen}: {said}" if said else seen)
    elif said:
        report.problems.append(said)
    report.broken += [problem for gpu in found for problem in gpu.problems]


def _all_reduce(rank: int) -> float:
    """GB of the tensor a second, the best of a few rounds over all the job's places."""
    import torch
    import torch.distributed

    size, local = int(os.environ["SLURM_NTASKS"]), int(os.environ["SLURM_LOCALID"])
    on_gpus = torch.cuda.is_available()
    if on_gpus:
        torch.cuda.set_device(local % torch.cuda.device_count())
    torch.distributed.init_process_group(
        "nccl" if on_gpus else "gloo", rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        return measure_all_reduce("cuda" if on_gpus else "cpu")
    finally:
        torch.distributed.destroy_process_group()


def _write(path: Path, report: NodeReport) -> None:
    atomic.write_text(path, json.dumps(asdict(report)))
