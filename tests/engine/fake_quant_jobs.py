"""What ranks do in the tests of fake quantization."""

from pathlib import Path

from torch import Tensor

from megatron_vl.config.load import load_stage
from megatron_vl.engine import process_groups
from megatron_vl.engine.fake_quant import FakeQuantized
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.initialize import initialize
from megatron_vl.train.build import build_model

Place = tuple[tuple[int, int], ...]


def values(file: Path, overrides: list[str]) -> dict[str, tuple[Place, Tensor]]:
    """This rank's parts of the fake-quantized weights, by stored name, and where they lie."""
    config = load_stage(file, overrides)
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    layers = FakeQuantized(module, groups, config.distill.student)
    layers.quantize(dict.fromkeys(layers.linears, 4.0), (1, 1))
    for linear in layers.linears.values():
        assert linear.operands is not None
        linear.weight.data = linear.operands(linear.weight, linear.weight)[1].detach()
    return {
        shard.key: (
            tuple((p.start, p.stop) for p in shard.global_slice()),
            shard.data.detach().clone(),
        )
        for shard in sharded_tensors(module, groups)
        if shard.key.startswith("language_model.decoder.layers.") and shard.data.dim() == 2
    }
