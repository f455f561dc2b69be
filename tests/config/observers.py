"""What can be seen of a stage's config, from outside of the config: one function a way of looking.

Each takes a loaded config and gives something that compares with ==. None starts a second process.
"""

import hashlib
from typing import Any

import torch

from launch.plan import plan_stage
from launch.plan_memory import stage_memory
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.recompute import recomputed_layers
from megatron_vl.data.loader import PackLoader, plan_settings
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.build import prepare_training
from megatron_vl.train.schedule import learning_rate
from tests.conftest import LAPTOP
from tests.data.reading import fingerprint, read


def plan(config: StageConfig) -> Any:
    """What `mvl plan` says of the stage."""
    said = plan_stage(LAPTOP / "stage1.yaml", config, "stage0")
    return [value for name, value in vars(said).items() if name != "config_hash"]


def memory(config: StageConfig) -> Any:
    """Bytes of every pipeline stage."""
    return stage_memory(config), recomputed_layers(config.model, config.parallel, config.recompute)


def kept(config: StageConfig) -> Any:
    """Bytes of every pipeline stage alone."""
    return stage_memory(config)


def built(config: StageConfig) -> Any:
    """The last rank of the layout: modules, shapes, arithmetic, groups and optimizer."""
    with pretend_rank(config.parallel, config.parallel.ranks - 1) as groups, meta_device():
        module = made_module(config, groups)
        trainee = prepare_training(module, config, groups)
        optimizer = trainee.optimizer
        parts = getattr(optimizer, "chained_optimizers", [optimizer])
        layers = module.language_model.decoder
        return (
            [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in
             module.named_parameters()],
            [group.size() for group in (groups.tp, groups.pp, groups.cp, groups.dp)],
            [_plain(part.config) for part in [module, *layers.layers] if hasattr(part, "config")],
            _plain(module.vision_model.config) if module.pre_process else None,
            _plain(module.vision_projection.config) if module.pre_process else None,
            [(name, _numbers(part)) for name, part in module.named_modules()],
            [(name, type(vars(part)["arithmetic"]).__name__) for name, part in
             module.named_modules() if "arithmetic" in vars(part)],
            getattr(vars(module.language_model).get("split"), "chunk", None),
            trainee.fp8 and trainee.fp8.history and trainee.fp8.history.history_WI3.shape,
            [_plain(part.config) for part in parts],
            [{k: v for k, v in group.items() if k != "params"} for part in parts
             if part.optimizer is not None for group in part.optimizer.param_groups],
        )  # fmt: skip


def drawn(config: StageConfig) -> Any:
    """The weights a stage starts from that draws them."""
    with pretend_rank(config.parallel) as groups:
        module = made_module(config, groups)
        initialize(module, groups, config.model, config.train.seed)
        return [float(parameter.detach().double().abs().sum()) for parameter in module.parameters()]


def rates(config: StageConfig) -> Any:
    """The learning rate of every step."""
    steps = config.train.steps
    return [learning_rate(config.optimizer, step, steps) for step in range(steps)]


def packs(config: StageConfig) -> Any:
    """The first global batches of the training split, decoded; or why there are none."""
    try:
        found = read(config, 2)
    except Exception as error:  # data that ends is seen too
        return f"{type(error).__name__}: {error}"
    pixels = [hashlib.sha256(pack.patches_PF.numpy().tobytes()).hexdigest() for pack in found]
    return [fingerprint(pack) for pack in found], pixels


def order(config: StageConfig) -> Any:
    """What the planner is told."""
    return plan_settings(config, "train")


def loader(config: StageConfig) -> Any:
    """The threads of a loader, what it decodes ahead, and what it forgives."""
    opened = PackLoader(config, split="train", rank=0, size=1)
    try:
        return opened._workers._max_workers, len(opened._waiting), vars(opened.bad)["_most"]
    finally:
        opened.close()


def made_module(config: StageConfig, groups: Any) -> VisionLanguageModel:
    """The model of the rank of some groups, marked for recompute."""
    from megatron_vl.engine.recompute import mark_decoder, mark_encoder

    module = VisionLanguageModel(
        config.model,
        config.parallel,
        config.precision,
        TORCH_BLOCKS,
        groups,
        sequence_length=config.data.sequence_length,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        loss_chunk=config.train.loss_chunk,
    )
    stack = module.language_model.decoder
    mark_decoder(stack.layers, stack.layer_type_list, config.recompute)
    if module.pre_process:
        mark_encoder(module.vision_model.decoder.layers, config.recompute)
    return module


def _plain(value: Any) -> dict[str, Any]:
    """The plain values among an object's attributes."""
    plain = (bool, int, float, str, type(None), torch.dtype)
    return {name: inner for name, inner in vars(value).items() if isinstance(inner, plain)}


def _numbers(part: Any) -> dict[str, Any]:
    return {name: v for name, v in vars(part).items() if isinstance(v, (bool, int, float))}
