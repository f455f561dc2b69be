"""`mvl doctor --job`: every node of a job is looked at before ranks are put on it.

One process on each node (one for each rank where the all-reduce is measured too) writes what it
found into the attempt's folder: Python and package versions, GPUs and their memory errors, free
disk, the rate of an all-reduce over all of them. `verdict` reads the files when the attempt closes
and names the nodes that are sick: the job then starts again without them.

Refuses to blame nodes for what most of them lack (disk, packages, a driver): that is the site's
setup, and a person's to mend. Memory errors of a GPU are always its own node's.
Costs a step of the job, about a second; with the all-reduce the time to load torch on every node.
"""

import json
import os
import re
import shutil
import socket
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

from launch import exit_codes
from launch.all_reduce import measure_all_reduce
from launch.attempt import Events
from launch.causes import Cause
from launch.gpus import read_gpus
from megatron_vl.run import atomic
from megatron_vl.run.versions import versions

FOLDER = "doctor"
"""In the attempt's folder: one file a process, and `NAME.well` beside those that found no fault."""
NODES = "nodes"
"""In the attempt's folder: the names of the job's nodes, one a line."""
_NODE = re.compile(r"[A-Za-z0-9_.-]+")
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


@dataclass(frozen=True)
class Verdict:
    """What the reports of a job's nodes come to.

    Attributes:
        sick: why, by node; those to leave out.
        cause: the class of the ending that follows; None when nothing is wrong.
        words: the same for a person.
        all_reduce_gb_s: the measured rate; None where it was not measured.
    """

    sick: dict[str, str]
    cause: Cause | None
    words: str
    all_reduce_gb_s: float | None


def main(args: Namespace) -> int:
    """Examine this process's node; writes DIR/RANK.json, and DIR/RANK.well when all is well."""
    rank = int(os.environ.get("SLURM_PROCID", "0"))
    report = NodeReport(
        os.environ.get("SLURMD_NODENAME", socket.gethostname()),
        rank,
        versions(),
    )
    folder = Path(args.job)
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


def verdict(attempt: Path) -> Verdict | None:
    """What was found in an attempt; None where nobody looked."""
    folder = attempt / FOLDER
    if not folder.is_dir():
        return None
    nodes = (attempt / NODES).read_text(encoding="utf-8").split()
    reports = [
        NodeReport(**json.loads(path.read_text(encoding="utf-8")))
        for path in sorted(folder.glob("*.json"), key=lambda path: int(path.stem))
    ]
    rate = next((r.all_reduce_gb_s for r in reports if r.all_reduce_gb_s is not None), None)
    local = _local_problems(nodes, reports)
    shared = [node for node in local if not any(r.broken for r in reports if r.node == node)]
    if local and 2 * len(shared) <= len(nodes):
        words = "; ".join(f"{node}: {why}" for node, why in local.items())
        return Verdict(local, Cause.node_lost, f"sick nodes: {words}", rate)
    if local:
        why = local[shared[0]]
        words = f"{len(shared)} of {len(nodes)} nodes are not fit, so it is the site's setup: {why}"
        return Verdict({}, Cause.bad_config, words, rate)
    slow = next((report.slow for report in reports if report.slow), "")
    if slow:
        return Verdict({}, Cause.node_lost, slow, rate)
    if len(list(folder.glob("*.well"))) < len(reports):
        words = "the nodes are well each by itself, but an all-reduce over them failed"
        return Verdict({}, Cause.node_lost, words, rate)
    return Verdict({}, None, "", rate)


def sick_nodes(events: Events) -> list[str]:
    """The nodes that were found sick in a run so far, by its journal."""
    found = [node for event in events if event["event"] == "examined" for node in event["sick"]]
    return [node for node in dict.fromkeys(found) if _NODE.fullmatch(node)]


def _local_problems(nodes: Sequence[str], reports: Sequence[NodeReport]) -> dict[str, str]:
    """What is wrong on single nodes: found there, said by nobody there, unlike the others."""
    found: dict[str, str] = {}
    by_node: dict[str, NodeReport] = {}
    for report in reports:
        by_node.setdefault(report.node, report)
        if report.broken or report.problems:
            found[report.node] = "; ".join([*report.broken, *report.problems])
    for node in nodes:
        if node not in by_node:
            found[node] = "no process of the job's first step spoke there"
    common = Counter(json.dumps(report.versions, sort_keys=True) for report in by_node.values())
    if len(common) > 1:
        usual = json.loads(common.most_common(1)[0][0])
        for node, report in by_node.items():
            differs = {k: v for k, v in report.versions.items() if usual.get(k) != v}
            if differs:
                told = ", ".join(f"{k} {v} (others {usual.get(k)})" for k, v in differs.items())
                found.setdefault(node, f"has other versions: {told}")
    return found


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
