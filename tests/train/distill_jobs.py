"""What ranks do in the distillation tests: some steps of a student against its start."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from checkpoint_tools import quantize
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.quantized_layout import applies
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.engine import process_groups
from megatron_vl.engine.input_amax import SUFFIX, decoder_linears, published
from megatron_vl.engine.sharding import fill
from megatron_vl.model.initialize import initialize
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.checkpoint import (
    LoopState,
    latest,
    load_calibration,
    load_optimizer,
    load_weights,
    read_state,
)
from megatron_vl.train.checkpoint_save import save
from megatron_vl.train.distill import (
    calibrate,
    calibrated_inputs,
    held_out_divergence,
    prepare_distillation,
)
from megatron_vl.train.evaluate_sets import evaluate_set
from tests.kernels.test_nvfp4 import decoded
from tests.train.jobs import steps


@dataclass(frozen=True)
class Distilled:
    """What some steps gave on one rank.

    Attributes:
        before, after: held-out divergence from the teacher.
        teacher: digest of its parameters, before and after.
        inputs: what activations are quantized by, of all stages.
        digest: of the student's parameters afterwards.
    """

    losses: list[float]
    grad_norms: list[float]
    before: float
    after: float
    teacher: tuple[str, str]
    inputs: dict[str, float]
    digest: str


def distilled(
    file: Path,
    overrides: list[str],
    num_steps: int,
    source: Path,
    resumed: Path | None = None,
    folder: Path | None = None,
    *,
    far: bool = False,
) -> Distilled:
    """Train some steps.

    Args:
        source: the teacher, and where the student starts.
        resumed: an earlier save of the student, to go on from.
        folder: where to save afterwards, optimizer state included.
        far: the student starts from weights drawn anew.
    """
    config = load_stage(file, overrides)
    trainee = student(config, source, resumed, far=far)
    first = read_state(resumed).step if resumed else 0
    distillation, calibration = trainee.distillation, calibrated_inputs(trainee)
    assert distillation is not None
    assert calibration is not None
    teacher, before = _digest(distillation.teacher), held_out_divergence(trainee, config)
    done = steps(trainee, config, first, first + num_steps)
    if folder is not None:
        last = first + num_steps
        cursor, trainable = last * config.train.global_batch, ["decoder", "encoder", "projector"]
        save(folder, trainee, LoopState(config.name, last, cursor, True, trainable))
    return Distilled(
        done.losses,
        done.grad_norms,
        before,
        held_out_divergence(trainee, config),
        (teacher, _digest(distillation.teacher)),
        calibration.inputs,
        _digest(trainee.module),
    )


def far(file: Path, overrides: list[str], num_steps: int, source: Path) -> Distilled:
    """`distilled`, far from the teacher."""
    return distilled(file, overrides, num_steps, source, far=True)


def student(
    config: StageConfig, source: Path, resumed: Path | None = None, *, far: bool = False
) -> Trainee:
    """A student and its teacher, as a stage starts or goes on with them."""
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    load_weights(resumed or source, module, groups)
    if far:
        initialize(module, groups, config.model, seed=5)
    trainee = prepare_training(module, config, groups)
    prepare_distillation(trainee, config, source)
    if resumed is None:
        calibrate(trainee, config, cursor=0)
    else:
        load_optimizer(resumed, trainee)
        load_calibration(resumed, trainee)
    return trainee


def released_loss(stage: Path, release: Path) -> float:
    """The held-out loss of a stage's checkpoint whose decoder multiplies what a release holds:
    its weights decoded, its inputs quantized by its input scales, by the exporter's own bytes."""
    config = load_stage(stage / "config.yaml")
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    checkpoint = latest(stage / "checkpoints")
    assert checkpoint is not None
    load_weights(checkpoint, module, groups)
    held: dict[str, Tensor] = {}
    for file in release.glob("*.safetensors"):
        held |= load_file(file)
    values: dict[str, Tensor] = {}
    for rule in name_table(config.model).rules:
        if applies(rule):
            found = [_decoded(held, slot.name.removesuffix(".weight")) for slot in rule.published]
            names = (slot.name for slot in rule.stored)
            values |= zip(names, rule.to_stored(found), strict=True)
    fill(module, groups, lambda key, shape: values[key], values.__contains__)
    linears = decoder_linears(module)
    numbers = published({place: float(i) for i, place in enumerate(linears)}, groups)
    for name, number in numbers.items():
        scale = held[name.removesuffix(SUFFIX) + ".input_scale"]
        list(linears.values())[int(number)].operands = partial(_quantized, scale)
    trainee = prepare_training(module, config, groups)
    return evaluate_set(config, trainee, config.evaluation.batches).loss


def _decoded(held: dict[str, Tensor], module: str) -> Tensor:
    packed = quantize.Fp4(held[module + ".weight"], held[module + ".weight_scale"])
    return decoded(packed, held[module + ".weight_scale_2"])


def _quantized(scale: Tensor, input_: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = input_.flatten(0, -2)
    return decoded(quantize.to_fp4(rows, scale), scale).view_as(input_), weight


def _digest(module: nn.Module) -> str:
    parts = (p.detach().reshape(-1).view(torch.uint8).numpy() for p in module.parameters())
    return hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()
