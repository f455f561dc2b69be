"""Keys that a stage sets and does not read."""

from pathlib import Path

import pytest

from megatron_vl.config.conditions import CONDITIONS, PLATFORM_KEYS, unread_keys, value_of
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import leaf_fields
from megatron_vl.config.load import load_stage, load_with_origins, to_yaml
from megatron_vl.config.schema import StageConfig
from tests.conftest import LAPTOP

STAGE1 = LAPTOP / "stage1.yaml"
UNREAD = {
    "fp8.first_layers_bf16": (["fp8.first_layers_bf16=2"], "precision: fp8_blockwise"),
    "fp8.last_layers_bf16": (["precision=bf16", "fp8.last_layers_bf16=0"], "precision"),
    "fp8.keep_bf16": (["fp8.keep_bf16=[projector]"], "precision"),
    "fp8.drift_every": (["fp8.drift_every=5"], "precision"),
    "fp8.amax_history": (["precision=fp8_blockwise", "fp8.amax_history=4"], "fp8_delayed"),
    "recompute.kinds": (["recompute.kinds=[mlp]"], "recompute.decoder: 1 or more"),
    "recompute.encoder": (["train.trainable=[projector]", "recompute.encoder=2"], "with encoder"),
    "data.min_patches": (["data.min_patches=64"], "data.tiling: native"),
    "data.max_patches": (["data.tiling=native_matched", "data.max_patches=512"], "native"),
    "data.packer": (["data.packing=false", "data.packer=first_fit"], "data.packing: true"),
    "data.max_samples_per_pack": (["data.packing=false", "data.max_samples_per_pack=5"], "packing"),
    "data.spare_packs": (["data.spare_packs=20"], "data.packer: balanced"),
    "distill.temperature": (["distill.temperature=2.0"], "distill.student: nvfp4"),
    "distill.calibration_batches": (["distill.calibration_batches=3"], "distill.student: nvfp4"),
    "gate.otherwise": (["gate.otherwise=continue"], "a bound"),
    "data.aligned_packs": (["data.order=random", "data.aligned_packs=4"], "data.order: aligned"),
}


@pytest.mark.parametrize("key", CONDITIONS)
def test_a_key_that_nothing_reads_is_refused(key: str) -> None:
    overrides, way_out = UNREAD[key]
    with pytest.raises(ConfigError) as caught:
        load_stage(STAGE1, overrides)
    (problem,) = caught.value.problems
    assert f"{key} is " in problem
    assert "only read where" in problem
    assert way_out in problem


@pytest.mark.parametrize("key", CONDITIONS)
def test_switches_are_keys_and_the_default_is_never_refused(key: str) -> None:
    assert set(CONDITIONS[key].switches) <= set(leaf_fields())
    assert key not in CONDITIONS[key].switches
    overrides, _ = UNREAD[key]
    switched = [text for text in overrides if not text.startswith(f"{key}=")]
    config = load_stage(STAGE1, switched)
    assert not CONDITIONS[key].holds(config)
    assert key not in unread_keys(config)


def test_platform_keys_are_keys() -> None:
    assert set(PLATFORM_KEYS) <= set(leaf_fields())


def test_a_later_switch_puts_the_key_back(tmp_path: Path) -> None:
    """`precision=bf16` on an FP8 recipe is no contradiction, and the resolved stage shows it."""
    fp8 = "precision: fp8_delayed\nfp8: {first_layers_bf16: 2, amax_history: 8}\n"
    base = (LAPTOP / "base.yaml").read_text().replace("precision: fp32\n", fp8)
    (tmp_path / "base.yaml").write_text(base)
    stage = tmp_path / "stage1.yaml"
    stage.write_text(STAGE1.read_text().replace("blends/", f"{LAPTOP}/blends/"))
    assert load_stage(stage).fp8.first_layers_bf16 == 2
    config, origins = load_with_origins(stage, ["precision=bf16"])
    assert value_of(config, "fp8.first_layers_bf16") == 1
    assert value_of(config, "fp8.amax_history") == StageConfig().fp8.amax_history
    assert "not read: precision was set later by override" in origins["fp8.amax_history"]
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(to_yaml(config))
    assert load_stage(resolved) == config
    both = ["precision=bf16", "fp8.first_layers_bf16=3"]
    for overrides in (both, both[::-1]):
        with pytest.raises(ConfigError, match=r"fp8\.first_layers_bf16 is 3"):
            load_stage(stage, overrides)
