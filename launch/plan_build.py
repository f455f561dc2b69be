"""`mvl plan --build-rank R`: one rank of the full layout, built here without its weights.

The only part of `mvl plan` that needs torch. Everything a job's rank would allocate before its
first step is made on the meta device, in a world of one process that sends nothing.
"""

import json
from dataclasses import asdict, replace

from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.bytes import rank_bytes


def print_built(configs: list[StageConfig], rank: int, *, as_json: bool) -> bool:
    """Build and print a rank of each stage; True where the formulas give the same bytes.

    Raises ValueError for a rank that a layout does not have.
    """
    from megatron_vl.train.allocate import build_rank

    agree = True
    found = []
    for config in configs:
        built = build_rank(config, rank)
        expected = rank_bytes(config, built.place["pipeline"], built.place["shard"])
        # A teacher is made from the loaded weights, FP8 copies in the first step.
        same = replace(expected, fp8_copies=0, teacher=0) == built.bytes
        agree = agree and same
        found.append(asdict(built) | {"stage": config.name, "rank": rank, "as_computed": same})
        if not as_json:
            print(_text(config, rank, found[-1]))
    if as_json:
        print(json.dumps(found))
    return agree


def _text(config: StageConfig, rank: int, built: dict) -> str:
    axes = ("tensor", "pipeline", "context", "data")
    place = ", ".join(f"{axis} {built['place'][axis]}" for axis in axes)
    lines = [
        f"{config.name}: rank {rank} of {config.parallel.ranks} ({place})",
        f"  decoder layers    {built['layers']}",
        f"  parameters        {built['parameters']:,} in {built['tensors']:,} tensors, "
        f"{built['trainable']:,} learn",
    ]
    for part in ("weights", "gradients", "optimizer"):
        lines.append(f"  {part:<17} {built['bytes'][part]:,} bytes")
    agrees = "the same as computed" if built["as_computed"] else "NOT what was computed"
    return "\n".join([*lines, f"  {agrees} from the config alone"])
