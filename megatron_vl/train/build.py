"""From a stage's config to what a rank trains: model, gradient buffers, optimizer."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import Float16Module

from megatron_vl.config.schema import Part, Precision, StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.engine.fp8_state import Fp8Layers, enable_fp8
from megatron_vl.engine.layer_specs import Blocks, blocks_for, open_blocks
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.engine.recompute import mark_decoder, mark_encoder
from megatron_vl.engine.sharding import mark_tensor_parallel
from megatron_vl.model.vlm import VisionLanguageModel
from megatron_vl.train.freeze import set_trainable

if TYPE_CHECKING:
    from megatron_vl.train.distill import Distillation


@dataclass
class Trainee:
    """What one rank trains.

    Attributes:
        module: this rank's pipeline stage of the model.
        wrapped: the same behind gradient buffers (and bfloat16 casts), as the schedules call it.
        optimizer: AdamW with its state sharded over data-parallel ranks.
        groups: process groups of the layout.
        learns: this rank holds at least one trainable parameter.
        trainable: trainable parameters of each part on this rank.
        fp8: what runs in FP8 on this rank; None where the precision is no FP8.
        distillation: teacher and fake quantization; None where the stage learns from labels.
    """

    module: VisionLanguageModel
    wrapped: DistributedDataParallel
    optimizer: MegatronOptimizer
    groups: ProcessGroupCollection
    learns: bool
    trainable: dict[Part, int]
    fp8: Fp8Layers | None = None
    distillation: "Distillation | None" = None


def build_model(
    config: StageConfig, groups: ProcessGroupCollection, blocks: Blocks | None = None
) -> VisionLanguageModel:
    """This rank's pipeline stage, weights not yet drawn or loaded.

    Args:
        blocks: the layer spec's modules; when None the platform's, with linears that can be
            quantized where the stage asks for it.

    Raises:
        ValueError: the pipeline ranks together built other layers than the pattern's.
    """
    if blocks is None:
        plain = config.distill.student is StudentFormat.none
        blocks = blocks_for(PLATFORM) if plain else open_blocks(PLATFORM)
    module = bare_model(config, groups, blocks)
    mark_tensor_parallel(module)
    stack = module.language_model.decoder
    mark_decoder(stack.layers, stack.layer_type_list, config.recompute)
    if module.pre_process:
        mark_encoder(module.vision_model.decoder.layers, config.recompute)
    _refuse_lost_layers(module, config, groups)
    return module


def bare_model(
    config: StageConfig, groups: ProcessGroupCollection, blocks: Blocks
) -> VisionLanguageModel:
    """This rank's modules, on whatever device is the default, unmarked and unchecked."""
    return VisionLanguageModel(
        config.model,
        config.parallel,
        config.precision,
        blocks,
        groups,
        sequence_length=config.data.sequence_length,
        pre_process=groups.pp.rank() == 0,
        post_process=groups.pp.rank() == groups.pp.size() - 1,
        loss_chunk=config.train.loss_chunk,
    )


def _refuse_lost_layers(
    module: VisionLanguageModel, config: StageConfig, groups: ProcessGroupCollection
) -> None:
    """Count the decoder layers that were really built, over all pipeline ranks."""
    built = torch.tensor(len(module.language_model.decoder.layers), device=PLATFORM.device)
    torch.distributed.all_reduce(built, group=groups.pp)
    pattern = config.model.decoder.pattern
    if int(built) != len(pattern):
        raise ValueError(
            f"the pipeline ranks built {int(built)} decoder layers together, the pattern "
            f"{pattern} has {len(pattern)}; set parallel.first_stage_layers"
        )


def prepare_training(
    module: VisionLanguageModel, config: StageConfig, groups: ProcessGroupCollection
) -> Trainee:
    """Freeze, allocate gradient buffers, make the optimizer and put the linears into FP8.

    Call after the starting weights are in place: the optimizer copies them.

    Raises:
        ValueError: the device or the layer spec cannot run the FP8 recipe.
    """
    trainable = set_trainable(module, frozenset(config.train.trainable))
    core_config = module.config
    inner = Float16Module(core_config, module) if _half(config) else module
    wrapped = DistributedDataParallel(
        core_config,
        DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            # It raises on one rank and leaves the others waiting; train_step checks on all.
            check_for_nan_in_grad=False,
        ),
        inner,
        pg_collection=groups,
    )
    optimizer_config = _core_optimizer_config(config)
    optimizer = get_megatron_optimizer(
        optimizer_config,
        [wrapped],
        # megatron-core's standard rule: no weight decay on biases and vectors.
        config_overrides=get_standard_config_overrides(optimizer_config),
        use_gloo_process_groups=False,
        pg_collection=groups,
    )
    # megatron-core leaves this to its scheduler, which is not used here.
    for group in optimizer.param_groups:
        group["weight_decay"] *= group["wd_mult"]
    core_config.finalize_model_grads_func = finalize_model_grads
    core_config.grad_scale_func = optimizer.scale_loss
    return Trainee(
        module=module,
        wrapped=wrapped,
        optimizer=optimizer,
        groups=groups,
        learns=sum(trainable.values()) > 0,
        trainable=dict(trainable),
        fp8=enable_fp8(module, config, groups),
    )


def _half(config: StageConfig) -> bool:
    return config.precision is not Precision.fp32


def _core_optimizer_config(config: StageConfig) -> CoreOptimizerConfig:
    optimizer = config.optimizer
    return CoreOptimizerConfig(
        optimizer="adam",
        lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        weight_decay=optimizer.weight_decay,
        adam_beta1=optimizer.beta1,
        adam_beta2=optimizer.beta2,
        adam_eps=optimizer.epsilon,
        clip_grad=optimizer.clip_grad,
        bf16=_half(config),
        params_dtype=torch.bfloat16 if _half(config) else torch.float32,
        use_distributed_optimizer=True,
    )
