"""A real Slurm on this machine: one controller and several virtual nodes, on loopback alone.

For trying a chain of jobs before a cluster is spent on it, and for the tests. Everything lies in
one folder: configuration, private munge key and socket, state and logs. Nothing is written in
/etc, nothing needs root, and a node is `127.0.0.11`, `127.0.0.12` ..., so that its name is its
address. Needs Debian's packages (`packages.INSTALL`), or a folder of them made without root. Uses
the standard library alone and knows nothing of `mvl`.

    python3 -m slurm.loopback up          # prints the line that points a shell at it
    python3 -m slurm.loopback down DIR

Refuses a folder whose path is too long for a unix socket. `down` ends only processes that carry
this cluster's configuration in their environment. Up in under a second; about 36 MB of memory.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from slurm.loopback.configuration import Configuration, write_files
from slurm.loopback.packages import INSTALL, ClusterError, library, missing_programs, search_path
from slurm.loopback.processes import find_processes, parent

_LONGEST_SOCKET = 107
_UP_SECONDS = 10.0
_DOWN_SECONDS = 5.0
_REPOSITORY = Path(__file__).resolve().parents[2]


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
        self.prefix = prefix.resolve() if prefix else None
        self._files = Configuration(
            self.root, self.nodes, gpus, cpus, min_job_age, policy, self.prefix
        )
        self.conf = self._files.conf
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def variables(self) -> dict[str, str]:
        """What a shell must export to use the cluster."""
        found = {"SLURM_CONF": str(self.conf)}
        if self.prefix:
            found["PATH"] = search_path(self.prefix)
            place = library(self.prefix)
            found["LD_LIBRARY_PATH"] = f"{place}:{place / 'slurm-wlm'}"
        return found

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment pointed at the cluster, without settings of another one."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        return kept | self.variables

    def up(self) -> None:
        """Write the configuration, start every daemon, return when all nodes are idle."""
        self._start()

    def up_while_alive(self) -> None:
        """As `up`, and the cluster goes down when this process ends, however it ends.

        A helper in a session of its own waits for that: the daemons cannot, they go to the
        background and start steps that outlive them.
        """
        self._keeper = start_keeper(self.root)
        self._start()

    def _start(self) -> None:
        socket_path = self.root / "run" / "munge.sock"
        if len(str(socket_path)) > _LONGEST_SOCKET:
            raise ClusterError(
                f"{socket_path}: longer than the {_LONGEST_SOCKET} characters of a unix socket; "
                "choose a shorter folder, such as /tmp/slurm"
            )
        absent = missing_programs(self.prefix)
        if absent:
            raise ClusterError(
                f"not installed: {', '.join(absent)}. On Debian or Ubuntu: {INSTALL}\n"
                "Without root: python3 -m slurm.loopback packages DIR, then up --prefix DIR"
            )
        write_files(self._files)
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
                break
        else:
            raise ClusterError(f"{self.root}: processes {self._pids()} do not end")
        if self._keeper is not None:
            self._keeper.communicate(timeout=2 * _DOWN_SECONDS)
            self._keeper = None

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
        steps = {parent(pid) for pid in tasks} & set(self._pids(("slurmstepd",)))
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
        return find_processes(self.conf, names, node)


def start_keeper(root: Path) -> subprocess.Popen[bytes]:
    """A helper that takes the cluster of a folder down when this process ends, however it ends, or
    when its standard input is closed."""
    return subprocess.Popen(
        [sys.executable, "-m", "slurm.loopback", "keep", str(root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        cwd=_REPOSITORY,
        start_new_session=True,
    )


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
