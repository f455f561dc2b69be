"""What the optimizer decays, and whose settings it follows."""

from pathlib import Path

import pytest

from megatron_vl.config.schema import Part
from megatron_vl.engine import process_groups
from megatron_vl.model.vlm import part_of
from tests.train import jobs
from tests.train.conftest import MakeConfig

TEXT_ALONE = "data.blend={text: 1}"


def test_matrices_decay_and_vectors_do_not(world: None, stage: MakeConfig) -> None:
    """Text gives the vision parts no gradient, so a step there is the decay and nothing else."""
    config = stage(
        "stage1",
        TEXT_ALONE,
        "train.trainable=[encoder, projector]",
        "optimizer.weight_decay=0.5",
        "optimizer.lr=0.125",
        "optimizer.warmup_fraction=0",
        "train.steps=1000",
    )
    trainee = jobs.drawn(config)
    named = dict(trainee.module.named_parameters())
    learning = {name: p for name, p in named.items() if part_of(name) is not Part.decoder}
    before = {name: p.detach().clone() for name, p in learning.items()}
    assert any(p.dim() == 1 and float(p.sum()) != 0 for p in learning.values())
    jobs.steps(trainee, config, 0, 1)
    rate = trainee.optimizer.param_groups[0]["lr"]
    assert rate == pytest.approx(0.125, rel=1e-4)
    for name, parameter in learning.items():
        expected = before[name] * (1 - rate * 0.5) if parameter.dim() > 1 else before[name]
        assert float((parameter - expected).abs().max()) < 1e-7, name


def test_the_stage_s_settings_rule_after_a_load(
    world: None, stage: MakeConfig, checkpoint: Path
) -> None:
    """Moments are carried over; decay, betas and epsilon are those of the stage that runs now."""
    config = stage(
        "stage1",
        "optimizer.weight_decay=0.3",
        "optimizer.beta1=0.7",
        "optimizer.beta2=0.6",
        "optimizer.epsilon=0.001",
    )
    trainee = jobs.loaded(config, checkpoint)
    groups = trainee.optimizer.param_groups
    assert sorted(group["weight_decay"] for group in groups) == [0.0, 0.3]
    for group in groups:
        assert group["betas"] == (0.7, 0.6)
        assert group["eps"] == 0.001


def test_learning_rates_of_the_steps_reach_every_group(world: None, stage: MakeConfig) -> None:
    config = stage("stage0", "optimizer.lr=0.004", "train.steps=20")
    trainee = jobs.drawn(config)
    jobs.steps(trainee, config, 0, 2)
    assert [group["lr"] for group in trainee.optimizer.param_groups] == [0.004, 0.004]
    process_groups.destroy()
