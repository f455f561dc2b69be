"""The processes of one cluster, found by what they carry in their environment.

A pid file that has gone stale is no licence to kill: a process counts only if its environment holds
this cluster's SLURM_CONF, and it is a daemon or belongs to a job. This process and those that
started it never count, so a job of the cluster may end the cluster. Costs one look at /proc.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmscriptd")


def find_processes(conf: Path, names: tuple[str, ...] = (), node: str = "") -> list[int]:
    """Process ids of a cluster.

    Args:
        conf: the cluster's SLURM_CONF.
        names: its daemons of these names alone.
        node: without names, the processes of its jobs on one node alone.
    """
    mark, place = f"SLURM_CONF={conf}".encode(), f"SLURMD_NODENAME={node}".encode()
    ancestors = set(_ancestors(os.getpid()))
    found = []
    for pid, environment in _processes():
        if mark not in environment or pid in ancestors:
            continue
        daemon = _name(pid)
        in_job = any(entry.startswith(b"SLURM_JOB_ID=") for entry in environment)
        if names:
            wanted = daemon in names
        elif node:
            wanted = in_job and place in environment
        else:
            wanted = in_job or daemon in _DAEMONS
        if wanted:
            found.append(pid)
    return found


def parent(pid: int) -> int:
    """The process that started another; 0 when that is gone."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _processes() -> Iterator[tuple[int, list[bytes]]]:
    """Every process of this user that is not a zombie, with its environment."""
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                content = (folder / "environ").read_bytes()
                if content:
                    yield int(folder.name), content.split(b"\0")


def _name(pid: int) -> str:
    """A program's name without the suffix that Debian's builds carry."""
    try:
        program = Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""
    return program.removesuffix("-wlm")


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        pid = parent(pid)
