"""What a step refuses, batches without images, and that looking at held-out data moves nothing."""

import pytest
import torch
from torch import Tensor

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.pack import Pack
from megatron_vl.engine import process_groups
from megatron_vl.train.build import Trainee
from megatron_vl.train.step import (
    NonFiniteLossError,
    count,
    evaluate_batch,
    run_batch,
    train_step,
)
from tests.train import jobs
from tests.train.conftest import MakeConfig


def batch(config: StageConfig, split: str = "train") -> list[Pack]:
    loader = PackLoader(config, split=split, rank=0, size=1)
    try:
        return loader.next_batch()
    finally:
        loader.close()


def weights(trainee: Trainee) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainee.module.named_parameters()}


def assert_unchanged(trainee: Trainee, before: dict[str, Tensor]) -> None:
    for name, tensor in weights(trainee).items():
        same = (tensor == before[name]) | (tensor.isnan() & before[name].isnan())
        assert bool(same.all()), name


@pytest.mark.parametrize(
    ("precision", "value"), [("fp32", float("nan")), ("bf16", float("inf"))], ids=str
)
def test_a_loss_that_is_not_finite_stops_before_the_update(
    world: None, stage: MakeConfig, precision: str, value: float
) -> None:
    config = stage("stage1", f"precision={precision}")
    trainee, packs = jobs.drawn(config), batch(config)
    jobs.steps(trainee, config, 0, 1)
    with torch.no_grad():
        trainee.module.language_model.decoder.final_norm.weight[3] = value
    before = weights(trainee)
    with pytest.raises(NonFiniteLossError, match=packs[0].sample_keys[0]):
        train_step(packs, count(packs, trainee), trainee, config, 1e-3)
    assert_unchanged(trainee, before)


def test_a_gradient_that_is_not_finite_stops_before_the_update(
    world: None, stage: MakeConfig
) -> None:
    """The loss is finite here: only the backward pass goes wrong."""
    config = stage("stage1")
    trainee, packs = jobs.drawn(config), batch(config)
    before = weights(trainee)
    weight = trainee.module.language_model.decoder.final_norm.weight
    weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(NonFiniteLossError, match="gradient"):
        train_step(packs, count(packs, trainee), trainee, config, 1e-3)
    assert_unchanged(trainee, before)


@pytest.mark.parametrize(
    "trainable", ["encoder,projector,decoder", "projector,decoder", "decoder", "projector"]
)
def test_a_batch_of_text_alone_trains(world: None, stage: MakeConfig, trainable: str) -> None:
    """Parts that see no picture get no gradient; a batch nobody learns from does not fail."""
    config = stage("stage1", "data.blend={text: 1, code: 1}", f"train.trainable=[{trainable}]")
    trainee = jobs.drawn(config)
    assert all(not pack.grids for pack in batch(config))
    trained = jobs.steps(trainee, config, 0, 2)
    learns = "decoder" in trainable
    assert [norm > 0 for norm in trained.grad_norms] == [learns, learns]
    for name, parameter in trainee.module.named_parameters():
        if name.startswith("vision_") and parameter.requires_grad:
            assert float(parameter.main_grad.abs().max()) == 0, name


def test_text_and_pictures_may_follow_each_other(world: None, stage: MakeConfig) -> None:
    config = stage("stage1", "data.blend={text: 1}")
    with_images = stage("stage1", "data.blend={captions: 1}")
    trainee = jobs.drawn(config)
    for one in (batch(config), batch(with_images), batch(config)[:1] + batch(with_images)[:1]):
        result = train_step(one, count(one, trainee), trainee, config, 1e-3)
        assert result.grad_norm > 0


def test_evaluation_moves_nothing(world: None, stage: MakeConfig) -> None:
    """Weights and random state stay; the next steps are those of a run that never looked."""
    config = stage("stage1")
    held_out = batch(config, "val")

    def run(evaluate: bool) -> tuple[list[float], dict[str, Tensor]]:
        trainee = jobs.drawn(config)
        losses = jobs.steps(trainee, config, 0, 1).losses
        if evaluate:
            before, state = weights(trainee), torch.get_rng_state()
            counts = count(held_out, trainee)
            seen = [evaluate_batch(held_out, counts, trainee, config) for _ in range(2)]
            assert seen[0] == seen[1]
            assert_unchanged(trainee, before)
            assert torch.equal(torch.get_rng_state(), state)
            trainee.wrapped.train()
            again = run_batch(held_out, counts, trainee, config, forward_only=True)
            assert again == seen[0]
        losses += jobs.steps(trainee, config, 1, 3).losses
        last = weights(trainee)
        process_groups.destroy()
        return losses, last

    looked, plain = run(True), run(False)
    assert looked[0] == plain[0]
    for name, tensor in plain[1].items():
        assert torch.equal(tensor, looked[1][name]), name
