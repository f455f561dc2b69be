#!/usr/bin/env python3
"""A real Slurm on this machine: one controller and several virtual nodes, on loopback alone.

For trying a chain of jobs before a cluster is spent on it, and for the tests. Everything lies in
one folder: configuration, private munge key and socket, state and logs. Nothing is written in
/etc, nothing needs root, and a node is `127.0.0.11`, `127.0.0.12` ..., so that its name is its
address. Needs Debian's packages (`apt-get install --no-install-recommends slurmctld slurmd
slurm-client munge`), or a folder of them made without root by `cluster.py packages DIR`. Uses the
standard library alone and knows nothing of `mvl`.

    python3 slurm/loopback/cluster.py up          # prints the line that points a shell at it
    python3 slurm/loopback/cluster.py down DIR

Refuses a folder whose path is too long for a unix socket. `down` ends only processes that carry
this cluster's configuration in their environment. Up in under a second; about 36 MB of memory.
"""

import argparse
import contextlib
import getpass
import os
import random
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge")
INSTALL = f"apt-get install -y --no-install-recommends {' '.join(PACKAGES)}"
_LIBRARIES = ("libhwloc15", "liblua5.1-0", "libmunge2", "slurm-wlm-basic-plugins")
_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
_DAEMONS = ("munged", "slurmctld", "slurmd", "slurmstepd", "slurmscriptd")
_LONGEST_SOCKET = 107
_UP_SECONDS = 10.0
_DOWN_SECONDS = 5.0


class ClusterError(RuntimeError):
    """The cluster cannot be brought up; the message says why and what to do."""


def missing_programs(prefix: Path | None = None) -> list[str]:
    """The programs of Slurm and munge that are not here (or not in an unpacked prefix)."""
    path = _path(prefix)
    return [name for name in _PROGRAMS if shutil.which(name, path=path) is None]


class Cluster:
    """One loopback cluster in one folder; cheap to make, `up` starts it.

    Args:
        root: its folder, short; made by `up`.
        nodes: virtual nodes.
        gpus: pretended GPUs of each node: CUDA_VISIBLE_DEVICES is set, no device is there.
        cpus: pretended CPUs of each node.
        min_job_age: seconds for which Slurm remembers a finished job.
        policy: text of a job_submit.lua, a site's own rules for submissions.
        prefix: folder that `packages` made; None uses what is installed.
    """

    def __init__(
        self,
        root: Path,
        *,
        nodes: int = 4,
        gpus: int = 8,
        cpus: int = 128,
        min_job_age: int = 86400,
        policy: str = "",
        prefix: Path | None = None,
    ) -> None:
        self.root = root.resolve()
        self.nodes = [f"127.0.0.{11 + index}" for index in range(nodes)]
        self.gpus, self.cpus = gpus, cpus
        self.min_job_age = min_job_age
        self.policy = policy
        self.prefix = prefix.resolve() if prefix else None

    @property
    def conf(self) -> Path:
        """The file SLURM_CONF points at."""
        return self.root / "etc" / "slurm.conf"

    @property
    def variables(self) -> dict[str, str]:
        """What a shell must export to use the cluster."""
        found = {"SLURM_CONF": str(self.conf)}
        if self.prefix:
            library = self.prefix / "usr" / "lib" / _multiarch()
            found["PATH"] = _path(self.prefix)
            found["LD_LIBRARY_PATH"] = f"{library}:{library / 'slurm-wlm'}"
        return found

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment pointed at the cluster, without settings of another one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return kept | self.variables

    def up(self) -> None:
        """Write the configuration, start every daemon, return when all nodes are idle."""
        absent = missing_programs(self.prefix)
        if absent:
            raise ClusterError(
                f"not installed: {', '.join(absent)}. On Debian or Ubuntu: {INSTALL}\n"
                f"Without root: python3 {Path(__file__).name} packages DIR, then --prefix DIR"
            )
        socket_path = self.root / "run" / "munge.sock"
        if len(str(socket_path)) > _LONGEST_SOCKET:
            raise ClusterError(
                f"{socket_path}: longer than the {_LONGEST_SOCKET} characters of a unix socket; "
                "choose a shorter folder, such as /tmp/slurm"
            )
        self._write()
        self._start_munge()
        self.start_controller()
        for node in self.nodes:
            self.start_node(node)
        self._wait_idle()

    def down(self) -> None:
        """Cancel all jobs and end every process of this cluster, and only those."""
        if self.conf.exists() and self._pids(("slurmctld",)):
            for partition in ("batch", "high"):
                self._quietly("scancel", "--partition", partition)
            _wait(lambda: not self._quietly("squeue", "-h"), _DOWN_SECONDS)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in self._pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            if _wait(lambda: not self._pids(), _DOWN_SECONDS):
                return
        raise ClusterError(f"{self.root}: processes {self._pids()} do not end")

    def command(self, *words: str) -> str:
        """Run one of Slurm's commands against the cluster and return what it printed."""
        done = subprocess.run(
            words, env=self.environment, capture_output=True, text=True, timeout=60
        )
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(words)}: {done.stderr.strip()}")
        return done.stdout.strip()

    def start_controller(self) -> None:
        """Start slurmctld; also after a kill: it goes on from its state on disk."""
        self._run("slurmctld")

    def start_node(self, name: str) -> None:
        """Start the slurmd of one node, which then reports to the controller."""
        words = ["slurmd", "-N", name]
        if self.prefix:
            words += ["-d", str(self.prefix / "bin" / "slurmstepd")]
        self._run(*words)

    def kill_controller(self) -> None:
        """SIGKILL to slurmctld and its helper, as a crash would."""
        for pid in self._pids(("slurmctld", "slurmscriptd")):
            os.kill(pid, signal.SIGKILL)

    def kill_node(self, name: str) -> None:
        """Lose a node: SIGKILL to its slurmd and to every process of jobs on it; mark it down."""
        pid_file = self.root / "run" / f"slurmd.{name}.pid"
        slurmd = int(pid_file.read_text())
        assert slurmd in self._pids(("slurmd",)), f"{pid_file} is stale"
        tasks = self._pids(node=name)
        # A step's daemon has no mark of its node; the tasks it started have.
        steps = {_parent(pid) for pid in tasks} & set(self._pids(("slurmstepd",)))
        for pid in (slurmd, *steps, *tasks):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.command("scontrol", "update", f"nodename={name}", "state=down", "reason=lost")

    def revive_node(self, name: str) -> None:
        """Bring a killed node back."""
        self.start_node(name)

        def up() -> bool:
            # Refused where the node came back by itself.
            self._quietly("scontrol", "update", f"nodename={name}", "state=resume")
            return self._quietly("sinfo", "-h", "-n", name, "-t", "idle,mixed,alloc") != ""

        if not _wait(up, _UP_SECONDS):
            raise ClusterError(f"{name} does not come back: {self._quietly('sinfo', '-R')}")

    def _write(self) -> None:
        for name in ("", "etc", "run", "log", "state", "gpu", *(f"spool/{n}" for n in self.nodes)):
            (self.root / name).mkdir(parents=True, exist_ok=True)
            (self.root / name).chmod(0o700 if name == "state" else 0o755)
        key = self.root / "etc" / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(1024))
        for index in range(self.gpus):
            link = self.root / "gpu" / f"nvidia{index}"
            link.unlink(missing_ok=True)
            link.symlink_to("/dev/null")  # Slurm wants a character device
        first = _free_ports(1 + len(self.nodes))
        plugins = []
        if self.policy:
            plugins.append("JobSubmitPlugins=lua")
            (self.conf.parent / "job_submit.lua").write_text(self.policy, encoding="utf-8")
        if self.prefix:
            library = self.prefix / "usr" / "lib" / _multiarch() / "slurm-wlm"
            plugins.append(f"PluginDir={library}")
        template = string.Template(
            Path(__file__).with_name("slurm.conf.template").read_text(encoding="utf-8")
        )
        hosts = f"127.0.0.[11-{10 + len(self.nodes)}]"
        text = template.substitute(
            root=self.root, host=socket.gethostname().partition(".")[0], user=getpass.getuser(),
            controller_port=first, node_ports=f"{first + 1}-{first + len(self.nodes)}",
            nodes=hosts, cpus=self.cpus, gpus=self.gpus, min_job_age=self.min_job_age,
            first_job=random.randrange(1000, 60000), plugins="\n".join(plugins),
        )  # fmt: skip
        self.conf.write_text(text, encoding="utf-8")
        gres = f"NodeName={hosts} Name=gpu Flags=nvidia_gpu_env File={self.root}/gpu/nvidia"
        gres += f"[0-{self.gpus - 1}]" if self.gpus > 1 else "0"
        (self.conf.parent / "gres.conf").write_text(gres + "\n" if self.gpus else "")
        (self.conf.parent / "cgroup.conf").write_text("CgroupAutomount=no\n")

    def _start_munge(self) -> None:
        run, etc, log = self.root / "run", self.root / "etc", self.root / "log"
        self._run(
            "munged", "--force", "--num-threads=2", f"--key-file={etc}/munge.key",
            f"--socket={run}/munge.sock", f"--pid-file={run}/munged.pid",
            f"--log-file={log}/munged.log", f"--seed-file={run}/munged.seed",
        )  # fmt: skip

    def _run(self, *words: str) -> None:
        """Start a daemon, which goes to the background by itself."""
        done = subprocess.run(
            words, env=self.environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, timeout=30,
        )  # fmt: skip
        if done.returncode != 0:
            raise ClusterError(f"{shlex.join(words)}: {done.stdout.strip()}")

    def _wait_idle(self) -> None:
        def idle() -> bool:
            found = self._quietly("sinfo", "-h", "-N", "-p", "batch", "-t", "idle", "-o", "%N")
            return sorted(found.split()) == sorted(self.nodes)

        if not _wait(idle, _UP_SECONDS):
            states = self._quietly("sinfo", "-N", "-o", "%N %t %E")
            log = self.root / "log" / "slurmctld.log"
            tail = "\n".join(log.read_text().splitlines()[-15:]) if log.exists() else "no log"
            raise ClusterError(f"nodes are not idle after {_UP_SECONDS:.0f} s:\n{states}\n{tail}")

    def _quietly(self, *words: str) -> str:
        try:
            return self.command(*words)
        except (ClusterError, subprocess.TimeoutExpired):
            return ""

    def _pids(self, names: tuple[str, ...] = (), node: str = "") -> list[int]:
        """This cluster's daemons of these names; without names, those of its jobs on a node.

        With neither, every process of the cluster but this one and those that started it.
        """
        mark, place = f"SLURM_CONF={self.conf}".encode(), f"SLURMD_NODENAME={node}".encode()
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


def _parent(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return 0
    return int(status.rpartition(")")[2].split()[1])


def _ancestors(pid: int) -> Iterator[int]:
    while pid > 1:
        yield pid
        pid = _parent(pid)


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


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def _multiarch() -> str:
    return f"{os.uname().machine}-linux-gnu"


def _path(prefix: Path | None) -> str:
    """Where programs are looked for; sbin too, which a user's PATH often lacks."""
    usual = os.environ.get("PATH", os.defpath) + ":/usr/local/sbin:/usr/sbin:/sbin"
    if prefix is None:
        return usual
    return ":".join(str(prefix / part) for part in ("bin", "usr/bin", "usr/sbin")) + ":" + usual


def fetch_packages(prefix: Path) -> None:
    """Download Debian's packages and unpack them into a folder: Slurm without root.

    Raises ClusterError where apt-get or dpkg is missing or fails.
    """
    prefix.mkdir(parents=True, exist_ok=True)
    steps = [["apt-get", "download", *PACKAGES, *_LIBRARIES]]
    try:
        with tempfile.TemporaryDirectory(prefix="slurm-packages-") as folder:
            for step in steps:
                subprocess.run(step, cwd=folder, check=True, capture_output=True, text=True)
            for package in sorted(Path(folder).glob("*.deb")):
                subprocess.run(
                    ["dpkg", "-x", package.name, str(prefix.resolve())],
                    cwd=folder, check=True, capture_output=True, text=True,
                )  # fmt: skip
    except FileNotFoundError as error:
        words = f"{error.filename} is not here; this works on Debian and Ubuntu"
        raise ClusterError(words) from None
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"{shlex.join(error.cmd)}: {error.stderr.strip()}") from None
    # Debian tells its Slurm from others by a suffix, which its own start-up scripts hide.
    (prefix / "bin").mkdir(exist_ok=True)
    for program in (prefix / "usr" / "sbin").glob("slurm*-wlm"):
        link = prefix / "bin" / program.name.removesuffix("-wlm")
        link.unlink(missing_ok=True)
        link.symlink_to(program.resolve())


def main() -> int:
    """Entry point: up, down or packages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster and print how to use it")
    up.add_argument("dir", nargs="?", type=Path, help="its folder; default: a new one in /tmp")
    up.add_argument("--nodes", type=int, default=4, help="virtual nodes; default: 4")
    up.add_argument("--gpus", type=int, default=8, help="pretended GPUs a node; default: 8")
    up.add_argument("--prefix", type=Path, help="a folder that `packages` made")
    down = commands.add_parser("down", help="end a cluster")
    down.add_argument("dir", type=Path, help="the folder it was started in")
    packages = commands.add_parser("packages", help="fetch Slurm into a folder, without root")
    packages.add_argument("dir", type=Path, help="where to put it, 14 MB")
    args = parser.parse_args()
    try:
        if args.command == "packages":
            fetch_packages(args.dir)
            print(f"Slurm is in {args.dir}; use it with: up --prefix {args.dir}")
        elif args.command == "down":
            Cluster(args.dir).down()
        else:
            root = args.dir or Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
            cluster = Cluster(root, nodes=args.nodes, gpus=args.gpus, prefix=args.prefix)
            cluster.up()
            for name, value in cluster.variables.items():
                print(f"export {name}={shlex.quote(value)}")
            here = shlex.quote(sys.argv[0])
            print(f"# to end it: python3 {here} down {shlex.quote(str(root))}")
    except ClusterError as error:
        print(f"cluster: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
