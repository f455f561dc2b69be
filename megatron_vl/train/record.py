"""What a layout computes, written down layer by layer: the rank side of `mvl check`.

Two optimizer steps on synthetic packs. Of the first: the embedded input, every layer's output and
the token losses of each pack, in the pack's order whatever shards hold them, and the gradient of
every parameter; of the second, which depends on the optimizer, the loss. Each rank writes what it
alone holds; `compare.py` joins two such records.

Refuses nothing of its own. Costs a forward pass more than the steps, and on disk four bytes a value
of every layer's output and every trainable parameter.

Shape suffixes: S this rank's part of the sequence, L pack length, B batch (1), H hidden.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from megatron.core.dist_checkpointing.mapping import is_main_replica
from safetensors.torch import save_file
from torch import Tensor, nn

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.pack import Pack
from megatron_vl.engine import process_groups
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.initialize import initialize
from megatron_vl.model.vlm import part_of
from megatron_vl.sequence.shards import unshard
from megatron_vl.train.build import Trainee, build_model, prepare_training
from megatron_vl.train.schedule import learning_rate
from megatron_vl.train.step import count, evaluate_batch, run_batch, train_step
from megatron_vl.train.synthetic import synthetic_packs

STEPS = 2


def record(config: StageConfig, folder: Path) -> None:
    """Run the two steps on this rank of a joined world and write this rank's part of the record."""
    groups = process_groups.create(config.parallel, config.train.seed)
    module = build_model(config, groups)
    initialize(module, groups, config.model, config.train.seed)
    trainee = prepare_training(module, config, groups)
    kept: dict[str, Tensor] = {}
    packs = synthetic_packs(config, 0, rank=groups.dp.rank(), size=groups.dp.size())
    with _watched(trainee, packs, kept):
        first = evaluate_batch(packs, count(packs, trainee), trainee, config)
    kept |= gradients(packs, trainee, config)
    losses = [first]
    for step in range(STEPS):
        packs = synthetic_packs(config, step, rank=groups.dp.rank(), size=groups.dp.size())
        rate = learning_rate(config.optimizer, step + 1, config.train.steps)
        losses.append(train_step(packs, count(packs, trainee), trainee, config, rate).loss)
    if torch.distributed.get_rank() == 0:
        kept |= {
            f"loss.{step}": torch.tensor([loss], dtype=torch.float64)
            for step, loss in enumerate(losses)
        }
    save_file(
        {name: tensor.contiguous().cpu() for name, tensor in kept.items()},
        folder / f"rank_{torch.distributed.get_rank():05d}.safetensors",
    )


@contextmanager
def _watched(trainee: Trainee, packs: list[Pack], kept: dict[str, Tensor]) -> Iterator[None]:
    """While open, forward passes leave what flows between layers in `kept`."""
    module, groups = trainee.module, trainee.groups
    passes = {"number": -1}
    writes = groups.tp.rank() == 0 and groups.cp.rank() == 0

    def keep(name: str, hidden_SBH: Tensor, *, sharded: bool) -> None:
        whole_LBH = in_pack_order(
            hidden_SBH, packs[passes["number"]], trainee, gather_sequence=sharded
        )
        if writes:
            pack = groups.dp.rank() + passes["number"] * groups.dp.size()
            kept[f"pack.{pack}.{name}"] = whole_LBH.float()

    def begins(*ignored: Any) -> None:
        passes["number"] += 1

    def enters(name: str, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        keep(name, hidden, sharded=module.config.sequence_parallel)

    def leaves(name: str, _: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        keep(name, hidden, sharded=module.config.sequence_parallel)

    def ends(_: nn.Module, args: tuple[Any, ...], losses_BL: Tensor) -> None:
        keep("token_losses", losses_BL.transpose(0, 1), sharded=False)

    layers = module.language_model.decoder.layers
    handles = [module.register_forward_pre_hook(begins)]
    if module.pre_process:
        handles.append(
            layers[0].register_forward_pre_hook(partial(enters, "embedded"), with_kwargs=True)
        )
    handles += [
        layer.register_forward_hook(partial(leaves, f"layer.{layer.layer_number - 1:03d}"))
        for layer in layers
    ]
    if module.post_process:
        handles.append(module.register_forward_hook(ends))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def in_pack_order(
    hidden_SBH: Tensor, pack: Pack, trainee: Trainee, *, gather_sequence: bool
) -> Tensor:
    """Activations of a whole pack from the shards of its tensor and context ranks.

    Args:
        gather_sequence: tensor ranks hold parts of the sequence (sequence parallelism).

    Returns:
        (L, B, H), on every rank of the two groups.
    """
    groups = trainee.groups
    if gather_sequence:
        hidden_SBH = gathered(hidden_SBH, groups.tp)
    if groups.cp.size() == 1:
        return hidden_SBH
    order_L = torch.from_numpy(unshard(pack.cu_seqlens.tolist(), groups.cp.size()))
    return gathered(hidden_SBH, groups.cp)[order_L.to(hidden_SBH.device)]


def gathered(part: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """The parts of all ranks of a group, one after the other."""
    parts = [torch.empty_like(part) for _ in range(group.size())]
    torch.distributed.all_gather(parts, part.contiguous(), group=group)
    return torch.cat(parts)


def gradients(packs: list[Pack], trainee: Trainee, config: StageConfig) -> dict[str, Tensor]:
    """This rank's parts of the gradient of one global batch, after all reductions, unclipped.

    Returns:
        Parts by `gradient.KEY@OFFSETS@GLOBAL SHAPE`, one writer for each part of each tensor.
    """
    trainee.wrapped.train()
    trainee.wrapped.zero_grad_buffer()
    run_batch(packs, count(packs, trainee), trainee, config, forward_only=False)
    gather_reduced(trainee)
    learns = {part.value for part in config.train.trainable}
    parts: dict[str, Tensor] = {}
    with gradients_as_weights(trainee):
        for shard in sharded_tensors(trainee.module, trainee.groups):
            if is_main_replica(shard.replica_id) and part_of(shard.key).value in learns:
                offsets = "x".join(map(str, shard.global_offset))
                shape = "x".join(map(str, shard.global_shape))
                parts[f"gradient.{shard.key}@{offsets}@{shape}"] = shard.data.detach().clone()
    return parts


def gather_reduced(trainee: Trainee) -> None:
    """Complete every gradient buffer: each rank has reduced its own part of it alone."""
    for buffer in trainee.wrapped.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            own = bucket.grad_data.chunk(group.size())[group.rank()].clone()
            bucket.grad_data.copy_(gathered(own, group))


@contextmanager
def gradients_as_weights(trainee: Trainee) -> Iterator[None]:
    """Let the model's tensors show their gradients, so that they are described as weights are."""
    weights = {}
    for name, parameter in trainee.module.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.data
            parameter.data = parameter.main_grad.view_as(parameter)
    try:
        yield
    finally:
        for name, parameter in trainee.module.named_parameters():
            if name in weights:
                parameter.data = weights[name]
