"""How many steps a stage takes, from what it says of its length."""

from pathlib import Path

import pytest

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.length import derivations
from megatron_vl.config.load import load_stage, load_with_origins, to_yaml
from tests.conftest import LAPTOP, REPOSITORY

STAGE1 = LAPTOP / "stage1.yaml"
PUBLISHED_STEPS = {"stage0": 2158, "stage1": 53644, "stage2": 8742, "stage3": 2384, "stage4": 301}
"""53.6 K, 8.74 K, 2.38 K: tokens over global batch times length; 2158 is printed in the paper."""


@pytest.mark.parametrize(("stage", "steps"), PUBLISHED_STEPS.items())
def test_published_steps_follow_from_samples_or_tokens(stage: str, steps: int) -> None:
    path = REPOSITORY / "stages/nano_12b_v2_vl" / f"{stage}.yaml"
    assert "steps:" not in path.read_text()
    config, origins = load_with_origins(path)
    assert config.train.steps == steps
    assert ", from train." in origins["train.steps"]
    (derivation,) = derivations(config).values()
    assert derivation.text().endswith(f"= {steps:,} steps")


def test_steps_follow_the_sizes_they_are_made_of() -> None:
    tokens = 7 * 4 * 512 + 100
    assert load_stage(STAGE1, [f"train.tokens={tokens}"]).train.steps == 7
    assert load_stage(STAGE1, [f"train.tokens={tokens}", "train.global_batch=2"]).train.steps == 14
    assert load_stage(STAGE1, ["train.tokens=1"]).train.steps == 1
    samples = ["data.packing=false", "train.samples=40", "train.global_batch=4"]
    assert load_stage(STAGE1, samples).train.steps == 10


def test_the_last_word_counts(tmp_path: Path) -> None:
    config, origins = load_with_origins(STAGE1, ["train.tokens=40960", "train.steps=9"])
    assert (config.train.steps, config.train.tokens) == (9, 0)
    assert "train.steps=9" in origins["train.tokens"]
    config = load_stage(STAGE1, ["train.steps=9", "train.tokens=40960"])
    assert (config.train.steps, config.train.tokens) == (20, 40960)
    # A resolved stage holds both, loads to itself, and refuses what would set them at odds.
    resolved = tmp_path / "stage1.yaml"
    resolved.write_text(to_yaml(config))
    assert load_stage(resolved) == config
    with pytest.raises(ConfigError, match=r"train.steps is 20, but train.tokens says .* = 10 ste"):
        load_stage(resolved, ["train.global_batch=8"])


def test_samples_need_a_sequence_each() -> None:
    with pytest.raises(ConfigError, match="a sequence holds several samples"):
        load_stage(STAGE1, ["train.samples=40"])
