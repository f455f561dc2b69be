"""A frozen part keeps every bit; a trained part moves in every tensor."""

import pytest
from torch import Tensor

from megatron_vl.config.schema import Part
from megatron_vl.model.vlm import part_of
from megatron_vl.train.build import Trainee
from tests.train import jobs
from tests.train.conftest import MakeConfig


def weights(trainee: Trainee) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainee.module.named_parameters()}


@pytest.mark.parametrize(
    "trainable",
    [["projector"], ["encoder"], ["projector", "decoder"], ["encoder", "projector", "decoder"]],
    ids="-".join,
)
def test_exactly_the_trainable_parts_move(
    world: None, stage: MakeConfig, trainable: list[str]
) -> None:
    config = stage("stage1", f"train.trainable=[{','.join(trainable)}]", "optimizer.lr=0.001")
    trainee = jobs.drawn(config)
    before = weights(trainee)
    jobs.steps(trainee, config, 0, 2)
    for name, tensor in weights(trainee).items():
        moved = not tensor.equal(before[name])
        assert moved == (part_of(name).value in trainable), name


def test_a_frozen_part_costs_no_gradient_and_no_optimizer_state(
    world: None, stage: MakeConfig
) -> None:
    trainee = jobs.drawn(stage("stage0"))
    sizes = {name: p.numel() for name, p in trainee.module.named_parameters()}
    projector = sum(n for name, n in sizes.items() if part_of(name) is Part.projector)
    assert trainee.trainable == {Part.projector: projector}
    assert trainee.learns
    # Buffers are padded so that ranks share them evenly.
    held = sum(buffer.grad_data.numel() for buffer in trainee.wrapped.buffers)
    assert projector <= held < projector + 1024
    groups = trainee.optimizer.param_groups
    assert sum(p.numel() for group in groups for p in group["params"]) == projector
    for name, parameter in trainee.module.named_parameters():
        assert hasattr(parameter, "main_grad") == (part_of(name) is Part.projector), name
