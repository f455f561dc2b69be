"""The files of one cluster: slurm.conf, gres.conf, cgroup.conf, a munge key, pretended GPUs.

`slurm.conf.template` is the text of the first. Ports are looked for when the files are written;
nothing outside the cluster's folder is touched.
"""

import contextlib
import getpass
import os
import random
import socket
import string
from dataclasses import dataclass
from pathlib import Path

from slurm.loopback.packages import ClusterError, library


@dataclass(frozen=True)
class Configuration:
    """What one cluster is.

    Attributes:
        root: its folder.
        nodes: names of the virtual nodes, which are their addresses.
        gpus, cpus: pretended devices of each node.
        min_job_age: seconds for which Slurm remembers a finished job.
        policy: text of a job_submit.lua; empty for none.
        prefix: folder of unpacked packages; None for what is installed.
    """

    root: Path
    nodes: list[str]
    gpus: int
    cpus: int
    min_job_age: int
    policy: str
    prefix: Path | None

    @property
    def conf(self) -> Path:
        """The file SLURM_CONF points at."""
        return self.root / "etc" / "slurm.conf"


def write_files(wanted: Configuration) -> None:
    """Make the cluster's folders and write its files. Raises ClusterError without free ports."""
    root = wanted.root
    for name in ("", "etc", "run", "log", "state", "gpu", *(f"spool/{n}" for n in wanted.nodes)):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name).chmod(0o700 if name == "state" else 0o755)
    key = root / "etc" / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    for index in range(wanted.gpus):
        link = root / "gpu" / f"nvidia{index}"
        link.unlink(missing_ok=True)
        link.symlink_to("/dev/null")  # Slurm wants a character device
    etc = wanted.conf.parent
    hosts = f"127.0.0.[11-{10 + len(wanted.nodes)}]"
    wanted.conf.write_text(_slurm_conf(wanted, hosts), encoding="utf-8")
    gres = f"NodeName={hosts} Name=gpu Flags=nvidia_gpu_env File={root}/gpu/nvidia"
    gres += f"[0-{wanted.gpus - 1}]" if wanted.gpus > 1 else "0"
    (etc / "gres.conf").write_text(gres + "\n" if wanted.gpus else "")
    (etc / "cgroup.conf").write_text("CgroupAutomount=no\n")
    if wanted.policy:
        (etc / "job_submit.lua").write_text(wanted.policy, encoding="utf-8")


def _slurm_conf(wanted: Configuration, hosts: str) -> str:
    first = _free_ports(1 + len(wanted.nodes))
    plugins = ["JobSubmitPlugins=lua"] * bool(wanted.policy)
    if wanted.prefix:
        plugins.append(f"PluginDir={library(wanted.prefix) / 'slurm-wlm'}")
    text = Path(__file__).with_name("slurm.conf.template").read_text(encoding="utf-8")
    return string.Template(text).substitute(
        root=wanted.root, host=socket.gethostname().partition(".")[0], user=getpass.getuser(),
        controller_port=first, node_ports=f"{first + 1}-{first + len(wanted.nodes)}",
        nodes=hosts, cpus=wanted.cpus, gpus=wanted.gpus, min_job_age=wanted.min_job_age,
        first_job=random.randrange(1000, 60000), plugins="\n".join(plugins),
    )  # fmt: skip


def _free_ports(count: int) -> int:
    """The first of `count` free neighbouring ports, below those the kernel gives to clients."""
    for _ in range(100):
        first = random.randrange(20000, 32000 - count)
        with contextlib.ExitStack() as probes:
            try:
                for port in range(first, first + count):
                    probe = probes.enter_context(socket.socket())
                    probe.bind(("0.0.0.0", port))
            except OSError:
                continue
            return first
    raise ClusterError(f"no {count} neighbouring ports are free between 20000 and 32000")
