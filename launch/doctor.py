"""`mvl doctor`: what this machine has, what it lacks, and what happens without it.

Versions come from package metadata, so nothing is imported that could be broken; the all-reduce
runs in two processes of its own, on GPUs where there are two. Says, and returns FOUND, when a
package that everything needs is missing, when it is of another version than this release was
tested with, when a GPU has memory errors, or when the all-reduce fails.
"""

import importlib.metadata
import json
import shutil
import sys
import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launch import exit_codes
from launch.all_reduce import MEGABYTES, measure_all_reduce
from launch.gpus import read_gpus
from launch.local import RankCommand, RankGroup, end_with_parent, rank_environment
from launch.reasons import last_exception
from launch.slurm.queue import slurm_is_here
from launch.tables import print_table

_LEAST_DISK_GB = 5.0


@dataclass(frozen=True)
class Package:
    """One package: its name, what it adds, and what happens without it."""

    name: str
    adds: str
    without: str
    needed: bool = False


PACKAGES = (
    Package("torch", "arithmetic, gradients, collectives", "nothing trains", needed=True),
    Package("megatron-core", "parallelism, optimizer, checkpoints", "nothing trains", needed=True),
    Package("megatron-energon", "data storage", "no data set is read", needed=True),
    Package("omegaconf", "stage and site files", "no command reads a recipe", needed=True),
    Package("transformer-engine", "fused and FP8 layers on GPUs", "plain torch layers: slower"),
    Package("mamba-ssm", "the Mamba-2 scan on GPUs", "the scan in plain torch: slower"),
    Package("causal-conv1d", "the Mamba-2 convolution on GPUs", "plain torch: slower"),
    Package("scikit-image", "pictures of the laptop's data", "`mvl data prepare` needs other data"),
    Package("scikit-learn", "texts of the laptop's data", "`mvl data prepare` needs other data"),
    Package("transformers", "the certificate of a release", "nothing is released"),
    Package("tensorboard", "curves in TensorBoard", "nothing trains", needed=True),
)


@dataclass
class Report:
    """What was found."""

    python: str
    packages: dict[str, str]
    """Version by name; empty for what is not installed."""
    gpus: list[str]
    slurm: bool
    disk_gb: float
    """Free on the disk of the working directory."""
    all_reduce_gb_s: float | None = None
    """Bytes of the tensor a second, between two ranks; None where it was not measured."""
    problems: list[str] = field(default_factory=list)


def main(args: Namespace) -> int:
    """Look, measure, and say."""
    report = examine()
    if not args.quick and report.packages["torch"]:
        rate, problem = all_reduce()
        report.all_reduce_gb_s = rate
        report.problems += [problem] if problem else []
    if args.json:
        print(json.dumps(asdict(report)))
    else:
        _print(report)
    return exit_codes.FOUND if report.problems else exit_codes.OK


def examine() -> Report:
    """All that can be seen without running anything heavy."""
    packages = {package.name: _version(package.name) for package in PACKAGES}
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    gpus, unread = read_gpus()
    named = [str(gpu) for gpu in gpus]
    report = Report(sys.version.split()[0], packages, named, slurm_is_here(), round(free, 1))
    report.problems += [unread] if unread else []
    report.problems += [problem for gpu in gpus for problem in gpu.problems]
    for package in PACKAGES:
        if package.needed and not packages[package.name]:
            report.problems.append(
                f"{package.name} is not installed: {package.without}; make setup"
            )
    tested = _tested_versions()
    for name, version in packages.items():
        plain = version.partition("+")[0]
        if version and name in tested and plain != tested[name]:
            report.problems.append(f"{name} is {version}, tested with {tested[name]}; make setup")
    if free < _LEAST_DISK_GB:
        report.problems.append(
            f"{free:.1f} GB are free in {Path.cwd()}; a laptop run takes about {_LEAST_DISK_GB:g}"
        )
    return report


def all_reduce() -> tuple[float | None, str]:
    """Rate of an all-reduce between two ranks of this machine, and what went wrong, if anything."""
    with tempfile.TemporaryDirectory(prefix="mvl-doctor-") as scratch:
        folder = Path(scratch)
        shared = rank_environment(2, 1)
        argv = [sys.executable, "-m", "launch.cli", "doctor-rank"]
        commands = [
            RankCommand(argv, {**shared, "RANK": str(r), "LOCAL_RANK": str(r)}, folder / f"{r}.log")
            for r in range(2)
        ]
        with RankGroup(commands) as group:
            result = group.wait()
        if result.first_failed is not None:
            said = last_exception(folder / f"{result.first_failed}.log")
            return None, f"the all-reduce between two ranks failed: {said or result.codes}"
        return float((folder / "0.log").read_text().split()[-1]), ""


def rank(args: Namespace) -> int:
    """One rank of the all-reduce; rank 0 prints the rate last."""
    end_with_parent()
    import torch
    import torch.distributed

    on_gpus = torch.cuda.device_count() >= 2
    torch.distributed.init_process_group("nccl" if on_gpus else "gloo")
    try:
        number = torch.distributed.get_rank()
        rate = measure_all_reduce(f"cuda:{number}" if on_gpus else "cpu")
        if number == 0:
            print(f"{rate:.2f}")
    finally:
        torch.distributed.destroy_process_group()
    return exit_codes.OK


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _tested_versions() -> dict[str, str]:
    """What constraints.txt pins; nothing where the repository is not beside the package."""
    path = Path(__file__).resolve().parents[1] / "constraints.txt"
    if not path.is_file():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if "==" in line]
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    return {name.lower(): version.strip() for name, version in pairs}


def _print(report: Report) -> None:
    rows = [
        (
            package.name,
            report.packages[package.name] or "not installed",
            package.adds,
            "" if report.packages[package.name] else package.without,
        )
        for package in PACKAGES
    ]
    print_table(
        f"Python {report.python}", ("package", "version", "adds", "without it"), rows, left=4
    )
    print(f"GPUs: {', '.join(report.gpus) or 'none; ranks run on CPUs, over gloo'}")
    slurm = "its commands are here" if report.slurm else "not here; --site local runs without"
    print(f"Slurm: {slurm}")
    print(f"disk: {report.disk_gb:.1f} GB free in {Path.cwd()}")
    if report.all_reduce_gb_s is not None:
        rate = f"{report.all_reduce_gb_s:.2f} GB/s"
        print(f"all-reduce of {MEGABYTES} MB between two ranks here: {rate}")
    for problem in report.problems:
        print(f"problem: {problem}")
    if not report.problems:
        print("nothing that is needed is missing")
