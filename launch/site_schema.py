"""The schema of a site file: every key that `slurm/sites/*.yaml` may hold, and what it means.

A site says what a stage file must not: where jobs run and how they are asked for. One dataclass per
section, one docstring per field, in the form of `megatron_vl/config/schema.py`; `mvl config schema
--site` prints them. A site with `launcher: local` reads `grace_seconds` alone.
"""

from dataclasses import dataclass, field
from enum import Enum


class Launcher(Enum):
    """Who starts the ranks."""

    local = "local"
    slurm = "slurm"


class Runtime(Enum):
    """What the ranks run inside."""

    none = "none"
    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class JobSection:
    """What every job asks Slurm for."""

    partition: str = ""
    """Partition; empty leaves it to the cluster. [name; sbatch]"""
    account: str = ""
    """Account that is charged; empty leaves it to the cluster. [name; sbatch]"""
    qos: str = ""
    """Quality of service; empty leaves it to the cluster. [name; sbatch]"""
    reservation: str = ""
    """Reservation to run in. [name; sbatch]"""
    constraint: str = ""
    """Features the nodes must have. [Slurm's expression; sbatch]"""
    exclude: list[str] = field(default_factory=list)
    """Nodes never to be used. [node names; sbatch]"""
    exclusive: bool = True
    """Share the nodes with no other job. [bool; sbatch]"""
    memory: str = ""
    """Memory of each node, such as 1800G; 0 is all of it, empty leaves it to the cluster. [Slurm's
    size; sbatch]"""
    cpus_per_task: int = 0
    """Cores of each rank; 0 leaves it to the cluster. [cores; sbatch, srun]"""
    mpi: str = "none"
    """Process management that srun offers the ranks; torch needs none. [name; srun]"""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, each written as --name or --name=value. [options; sbatch]"""


@dataclass
class NodeSection:
    """The nodes of the partition."""

    tasks: int = 8
    """Ranks on each node, one for each GPU. [ranks a node; sbatch]"""
    gpus: int = 8
    """GPUs asked for on each node; 0 asks for none (ranks on CPUs). [GPUs a node; sbatch]"""
    gpu_gib: float = 0.0
    """Memory of one GPU, which the plan holds the ranks' needs against; 0 leaves that out. [GiB;
    plan]"""
    most: int = 0
    """Most nodes of one job; 0 sets no limit. [nodes; plan]"""


@dataclass
class TimeSection:
    """Wall time: what a job may take, and when it begins to stop."""

    limit_minutes: int = 240
    """Wall time asked for; Slurm ends a job that takes longer. [minutes; sbatch]"""
    lead_seconds: int = 300
    """Time before the limit at which Slurm warns the job, which then saves and stops; the ranks
    themselves stop earlier or later by what their saves have taken so far. [seconds; sbatch]"""
    start_seconds: int = 180
    """From a job's start to its first step, for the plan. [seconds; plan]"""
    save_seconds: int = 60
    """One save, for the plan, until saves of the run have been measured. [seconds; plan]"""


@dataclass
class RequeueSection:
    """How often a stage is started again, by what ended it. Memory running out, NaN, a bad config
    and bad data are never retried: the stage is held until a person has looked."""

    enabled: bool = True
    """Let a job put itself back into the queue, and Slurm too when a node fails. [bool; sbatch]"""
    time_limit: int = 200
    """Starts after the time limit's warning. [starts; job]"""
    preempted: int = 200
    """Starts after another job took the nodes. [starts; job]"""
    node_lost: int = 10
    """Starts after a node failed or a rank vanished. [starts; job]"""
    crashed: int = 5
    """Starts after a rank ended with an error of no known class. [starts; job]"""
    without_progress: int = 3
    """Attempts in a row that preemption or a lost node may end without a new checkpoint; a crash
    may end one so, the time limit none. [attempts; job]"""


@dataclass
class ContainerSection:
    """What the ranks and the job's own bookkeeping run inside."""

    runtime: Runtime = Runtime.none
    """none, pyxis (with enroot) or apptainer. [choice; srun]"""
    image: str = ""
    """The image: a file, or what the runtime calls one. [image; srun]"""
    mounts: list[str] = field(default_factory=list)
    """Folders to show inside, each SRC:DST or SRC:DST:ro; the run folder is always shown under its
    own path. [mounts; srun]"""
    options: list[str] = field(default_factory=list)
    """Further options: of srun under pyxis, of `apptainer exec` under apptainer. [options; srun]"""


@dataclass
class EnvironmentSection:
    """What the job's processes find in their environment. Scripts hold no secret: a secret is
    exported by name or read from a file."""

    python: str = ""
    """The interpreter on the nodes, or in the container; empty is the one that submits. [path;
    job]"""
    export: list[str] = field(default_factory=lambda: ["PATH", "HOME", "LD_LIBRARY_PATH"])
    """Variables whose value at submission goes to the job, outside of its script. [names;
    sbatch]"""
    set: dict[str, str] = field(default_factory=dict)
    """Variables written into the script; not for secrets. [values by name; job]"""
    file: str = ""
    """A shell file of NAME=value lines with mode 0600 that the job reads when it starts; absolute.
    [path; job]"""
    setup: list[str] = field(default_factory=list)
    """Shell lines to run first, such as module load. [shell; job]"""


@dataclass
class DoctorSection:
    """What a job looks at on its nodes before its ranks start (`mvl doctor-node`). A sick node is
    named in the journal, and the job starts again without it."""

    enabled: bool = True
    """Look at the nodes. [bool; job]"""
    all_reduce: bool = True
    """Measure an all-reduce over all places of the job too, which loads torch on each. [bool;
    job]"""
    least_gb_s: float = 0.0
    """Slowest all-reduce to start on: the bytes of a tensor of 64 MB a second. [GB/s; job]"""
    least_disk_gb: float = 5.0
    """Least space on the disk of the run folder to start with. [GB; job]"""


@dataclass
class SiteConfig:
    """One site, as `site.load_site` returns it."""

    launcher: Launcher = Launcher.slurm
    """local: processes of this machine; slurm: jobs of a cluster. [choice; submit]"""
    grace_seconds: float = 30.0
    """Between the request to stop and the kill, on launcher local. [seconds; submit]"""
    job: JobSection = field(default_factory=JobSection)
    """The job. [section; sbatch]"""
    nodes: NodeSection = field(default_factory=NodeSection)
    """The nodes. [section; sbatch]"""
    time: TimeSection = field(default_factory=TimeSection)
    """Wall time. [section; sbatch]"""
    requeue: RequeueSection = field(default_factory=RequeueSection)
    """Starts after an end. [section; job]"""
    container: ContainerSection = field(default_factory=ContainerSection)
    """The container. [section; srun]"""
    environment: EnvironmentSection = field(default_factory=EnvironmentSection)
    """The environment. [section; job]"""
    doctor: DoctorSection = field(default_factory=DoctorSection)
    """The look at the nodes. [section; job]"""
    tokens_per_s: dict[str, float] = field(default_factory=dict)
    """Tokens a second of one GPU in each stage, for the plan's hours; `default` is for stages that
    are not named, and without either the plan leaves hours out. [tokens/s/GPU by stage; plan]"""
