"""What a stage asks of a cluster: nodes, wall time, starts, GPU hours. Arithmetic alone.

Refuses: ranks that do not fill their nodes evenly, more nodes than the site has, a time limit that
starting, warning and saving use up.
"""

import math
from dataclasses import dataclass

from launch.site_schema import SiteConfig
from megatron_vl.config.check import nearest_multiple
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import Work
from megatron_vl.run.stop import LEAST_LEAD_SECONDS, seconds_to_stop


@dataclass(frozen=True)
class Measured:
    """What a stage's earlier attempts took: the longest, in seconds."""

    save_seconds: float
    step_seconds: float


@dataclass(frozen=True)
class Shape:
    """The size of one stage's job.

    Attributes:
        nodes, tasks: nodes, and ranks on each.
        gpus: GPUs on each node; 0 for ranks on CPUs.
        lead_seconds: from Slurm's warning to the time limit.
        work_hours: time for the stage's steps; None when the site states no rate for it.
        starts: jobs of the time limit's length that the work takes; None without work_hours.
        wall_hours: work, starts and saves together; None without work_hours.
    """

    nodes: int
    tasks: int
    gpus: int
    lead_seconds: int
    work_hours: float | None
    starts: int | None
    wall_hours: float | None

    @property
    def gpu_hours(self) -> float | None:
        """GPUs held, over the wall time; ranks where there are no GPUs."""
        return None if self.wall_hours is None else self.wall_hours * self.nodes * self.devices

    @property
    def devices(self) -> int:
        """GPUs of a node that the job holds, or its ranks."""
        return self.gpus or self.tasks


def shape_of(config: Work, site: SiteConfig, measured: Measured | None = None) -> Shape:
    """The job of one stage or node; a node is one process whose hours nobody states. Raises
    ConfigError."""
    if not isinstance(config, StageConfig):
        return Shape(1, 1, min(site.nodes.gpus, 1), lead_seconds(site, measured), None, None, None)
    nodes, tasks = _split(config, site)
    lead = lead_seconds(site, measured)
    gpus = min(site.nodes.gpus, tasks) if site.nodes.gpus else 0
    rate = site.tokens_per_s.get(config.name, site.tokens_per_s.get("default"))
    if rate is None:
        return Shape(nodes, tasks, gpus, lead, None, None, None)
    train = config.train
    tokens = train.steps * train.global_batch * config.data.sequence_length
    work = tokens / (rate * config.parallel.ranks)
    overhead = lead + site.time.start_seconds
    usable = site.time.limit_minutes * 60 - overhead
    if usable <= 0:
        raise ConfigError(
            f"{config.name}: time.limit_minutes {site.time.limit_minutes} leaves no time to train "
            f"after {site.time.start_seconds} s of starting and a warning {lead} s before the end; "
            f"nearest valid: {overhead // 60 + 1}"
        )
    starts = max(1, math.ceil(work / usable))
    save = measured.save_seconds if measured else site.time.save_seconds
    wall = work + starts * (site.time.start_seconds + save)
    return Shape(nodes, tasks, gpus, lead, work / 3600, starts, wall / 3600)


def lead_seconds(site: SiteConfig, measured: Measured | None) -> int:
    """From Slurm's warning to the limit: what a stop has been seen to need, else the site's."""
    if measured is None:
        return site.time.lead_seconds
    needed = seconds_to_stop(measured.save_seconds, measured.step_seconds)
    return max(LEAST_LEAD_SECONDS, math.ceil(needed))


def _split(config: StageConfig, site: SiteConfig) -> tuple[int, int]:
    """Nodes, and ranks on each."""
    ranks, tasks = config.parallel.ranks, site.nodes.tasks
    if ranks <= tasks:
        return 1, ranks
    if ranks % tasks:
        data = config.parallel.data
        others = ranks // data
        step = tasks // math.gcd(others, tasks)
        raise ConfigError(
            f"{config.name}: {ranks} ranks do not fill nodes of {tasks} ranks (nodes.tasks) "
            f"evenly; nearest valid: parallel.data {nearest_multiple(data, step)}"
        )
    nodes = ranks // tasks
    if site.nodes.most and nodes > site.nodes.most:
        raise ConfigError(
            f"{config.name}: {ranks} ranks need {nodes} nodes of {tasks} ranks, nodes.most is "
            f"{site.nodes.most}; nearest valid: {site.nodes.most * tasks} ranks"
        )
    return nodes, tasks
