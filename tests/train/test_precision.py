"""bfloat16 trains like float32, and normalises pixels with the same numbers."""

import pytest
import torch

from megatron_vl.engine import process_groups
from megatron_vl.model.radio import PIXEL_MEAN, PIXEL_STD
from tests.train import jobs
from tests.train.conftest import MakeConfig

STEPS = 12


def test_bfloat16_follows_float32(world: None, stage: MakeConfig) -> None:
    results = {}
    for precision in ("fp32", "bf16"):
        config = stage("stage1", f"precision={precision}", "optimizer.lr=0.003")
        trainee = jobs.drawn(config)
        expected = torch.float32 if precision == "fp32" else torch.bfloat16
        assert {p.dtype for p in trainee.module.parameters()} == {expected}
        results[precision] = jobs.steps(trainee, config, 0, STEPS)
        process_groups.destroy()
    single, half = results["fp32"].losses, results["bf16"].losses
    assert half[-1] < half[0] - 0.1
    assert half == pytest.approx(single, rel=0.01)
    # They would be equal if the precision did nothing.
    assert half != single
    assert results["bf16"].grad_norms == pytest.approx(results["fp32"].grad_norms, rel=0.1)


def test_pixels_are_normalised_with_full_statistics(world: None, stage: MakeConfig) -> None:
    """Rounded to bfloat16 a mean of 122.77 is 122.5 or 123, and training would not see the pixels
    that inference sees."""
    trainee = jobs.drawn(stage("stage1", "precision=bf16"))
    encoder = trainee.module.vision_model
    for buffer, numbers in (
        (encoder.pixel_shift_C, PIXEL_MEAN),
        (encoder.pixel_scale_C, PIXEL_STD),
    ):
        exact = torch.tensor([number * 255 for number in numbers])
        assert torch.equal(buffer.float(), exact)


def test_the_optimizer_keeps_float32_weights(world: None, stage: MakeConfig) -> None:
    """Steps too small for a bfloat16 near 1 add up in the optimizer's copy."""
    config = stage("stage1", "precision=bf16", "optimizer.lr=1.0e-5", "optimizer.weight_decay=0")
    trainee = jobs.drawn(config)
    main = [p for group in trainee.optimizer.param_groups for p in group["params"]]
    assert {p.dtype for p in main} == {torch.float32}
    before = [p.detach().clone() for p in main]
    jobs.steps(trainee, config, 0, 2)
    assert not any(torch.equal(p, b) for p, b in zip(main, before, strict=True))
    norm = trainee.module.language_model.decoder.final_norm.weight
    assert bool((norm == 1).all())
