"""The memory of a stage's ranks, part by part, for `mvl plan`. Arithmetic alone, no torch.

Every pipeline stage is a row: its fullest rank, the ranks beside it differ by padding. What learns
and what it needs is exact (`cost.bytes`); activations are an estimate (`cost.activations`), and the
device's own needs (context, communication, fragments) come on top.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from launch.tables import print_table
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.activations import activation_bytes
from megatron_vl.cost.bytes import rank_bytes
from megatron_vl.cost.recompute import pipeline_stages

GIB, MIB = 2**30, 2**20


@dataclass(frozen=True)
class RankMemory:
    """Bytes of the fullest rank of a pipeline stage, by part."""

    stage: str
    pipeline_rank: int
    weights: int
    gradients: int
    optimizer: int
    fp8_copies: int
    teacher: int
    encoder: int
    projector: int
    decoder: int
    mamba_states: int
    logits: int
    work: int
    total: int
    """Logits and work in progress are not there at one time; the larger counts."""

    @property
    def label(self) -> str:
        """The stage, with the pipeline rank where there are several."""
        return self.stage if self.pipeline_rank < 0 else f"{self.stage} PP{self.pipeline_rank}"


def stage_memory(config: StageConfig) -> list[RankMemory]:
    """A row for each pipeline stage."""
    count = len(pipeline_stages(config.model.decoder.pattern, config.parallel))
    rows = []
    for stage in range(count):
        held, running = rank_bytes(config, stage), activation_bytes(config, stage)
        rows.append(
            RankMemory(
                stage=config.name,
                pipeline_rank=stage if count > 1 else -1,
                **dataclasses.asdict(held),
                **dataclasses.asdict(running),
                total=held.total + running.total,
            )
        )
    return rows


def too_large(config: StageConfig, gpu_bytes: int) -> str | None:
    """What is wrong where the fullest rank does not fit a device, and the nearest way out."""
    most = max(stage_memory(config), key=lambda row: row.total)
    if most.total <= gpu_bytes:
        return None
    text = (
        f"{most.label}: the fullest rank needs about {_gib(most.total)} GiB, a GPU has "
        f"{_gib(gpu_bytes)} (nodes.gpu_gib)"
    )
    ways = []
    decoder, encoder = len(config.model.decoder.pattern), config.model.encoder.num_layers
    for key, most_layers in (("encoder", encoder), ("decoder", decoder)):
        layers = _least_recompute(config, key, most_layers, gpu_bytes)
        if layers is not None:
            ways.append(f"recompute.{key} {layers}")
    tensor = _least_tensor(config, gpu_bytes)
    if tensor is not None:
        ways.append(f"parallel.tensor {tensor}")
    return f"{text}; nearest valid: {', or '.join(ways) or 'more ranks along tensor or pipeline'}"


def _least_recompute(config: StageConfig, key: str, layers: int, room: int) -> int | None:
    """The fewest recomputed layers with which the stage fits."""
    if key == "encoder" and key not in {part.value for part in config.train.trainable}:
        return None
    for count in range(getattr(config.recompute, key), layers + 1):
        recompute = dataclasses.replace(config.recompute)
        setattr(recompute, key, count)
        if _fits(dataclasses.replace(config, recompute=recompute), room):
            return count
    return None


def _least_tensor(config: StageConfig, room: int) -> int | None:
    """The fewest tensor ranks, a power of two beyond the present ones, with which it fits."""
    tensor = 2 * config.parallel.tensor
    while config.model.decoder.mamba_num_groups % tensor == 0:
        parallel = dataclasses.replace(config.parallel, tensor=tensor)
        if _fits(dataclasses.replace(config, parallel=parallel), room):
            return tensor
        tensor *= 2
    return None


def _fits(config: StageConfig, room: int) -> bool:
    return all(row.total <= room for row in stage_memory(config))


def print_memory(rows: Sequence[RankMemory]) -> None:
    """A table of the parts; GiB, or MiB where everything is small."""
    unit, name = (GIB, "GiB") if max(row.total for row in rows) >= GIB else (MIB, "MiB")
    parts = [field.name for field in dataclasses.fields(RankMemory)][2:]
    parts = [part for part in parts if any(getattr(row, part) for row in rows)]
    cells = [(row.label, *(f"{getattr(row, part) / unit:,.1f}" for part in parts)) for row in rows]
    words = {"optimizer": "optimizer shard", "fp8_copies": "FP8 copies"}
    names = [words.get(part, part.replace("_", " ")) for part in parts]
    print_table(f"memory of the fullest rank, {name}", ("stage", *names), cells, left=1)
    print("activations (from encoder on) are estimates; see --build-rank for what is exact")


def _gib(size: int) -> str:
    return f"{size / GIB:,.1f}"
