"""No setting without effect: every key of the schema, changed, changes what can be seen, or is
refused. A key that is in none of the tables below fails."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import exit_codes
from launch.cli import main
from megatron_vl.config.conditions import CONDITIONS, value_of
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import leaf_fields
from megatron_vl.config.load import differences, load_stage
from tests.config import chain_observers, observers
from tests.config.loop_jobs import loop_facts
from tests.conftest import DRAWN, LAPTOP, TINY, SmallData
from tests.support.ranks import RankPool

STAGE = LAPTOP / "stage1.yaml"
Observer = Callable[[Any], Any]
SHALLOW = ["model.decoder.pattern='M-M*'", "model.encoder.num_layers=2", "parallel.data=1"]
FP8 = ["precision=fp8_blockwise", "data.sequence_length=256"]
IMAGES = "data.blend={captions: 1, ocr: 1, qa: 1}"
WHOLE = ["data.tiling=native", "data.min_patches=16", "data.max_patches=900"]
CLIPS = "data.blend={clips: 1}"
PACKS = ["parallel.data=1", "data.packing_window=40", "data.aligned_packs=0"]

BUILT: dict[str, tuple[list[str], str]] = {
    "precision": ([], "bf16"),
    "model.padded_vocab_size": ([], "2064"),
    "model.decoder.pattern": ([], "M-*"),
    "model.decoder.hidden_size": ([], "192"),
    "model.decoder.ffn_hidden_size": ([], "256"),
    "model.decoder.num_attention_heads": ([], "8"),
    "model.decoder.num_query_groups": ([], "4"),
    "model.decoder.head_dim": ([], "16"),
    "model.decoder.mamba_num_heads": ([], "4"),
    "model.decoder.mamba_head_dim": ([], "16"),
    "model.decoder.mamba_state_dim": ([], "16"),
    "model.decoder.mamba_num_groups": ([], "4"),
    "model.decoder.mamba_chunk_size": ([], "32"),
    "model.decoder.norm_epsilon": ([], "1e-6"),
    "model.encoder.num_layers": ([], "1"),
    "model.encoder.hidden_size": ([], "64"),
    "model.encoder.ffn_hidden_size": ([], "128"),
    "model.encoder.num_attention_heads": ([], "2"),
    "model.encoder.patch_size": ([], "4"),
    "model.encoder.position_grid": ([], "16"),
    "model.encoder.num_prefix_tokens": ([], "8"),
    "model.encoder.norm_epsilon": ([], "1e-5"),
    "model.projector.ffn_hidden_size": ([], "256"),
    "model.projector.norm_epsilon": ([], "1e-6"),
    "parallel.tensor": ([], "2"),
    "parallel.pipeline": ([], "2"),
    "parallel.context": (["data.document_alignment=4"], "2"),
    "parallel.data": ([], "4"),
    "parallel.sequence": (["parallel.tensor=2"], "true"),
    "parallel.first_stage_layers": (["parallel.pipeline=2"], "1"),
    "recompute.decoder": ([], "2"),
    "recompute.encoder": ([], "1"),
    "recompute.kinds": (["recompute.decoder=4"], "[mlp]"),
    "fp8.first_layers_bf16": (FP8, "2"),
    "fp8.last_layers_bf16": (FP8, "0"),
    "fp8.keep_bf16": (FP8, "[projector]"),
    "fp8.amax_history": (["precision=fp8_delayed", "data.sequence_length=256"], "4"),
    "optimizer.beta1": ([], "0.8"),
    "optimizer.beta2": ([], "0.95"),
    "optimizer.epsilon": ([], "1e-6"),
    "optimizer.weight_decay": ([], "0.2"),
    "optimizer.clip_grad": ([], "0.5"),
    "train.trainable": ([], "[projector]"),
    "train.loss_chunk": ([], "128"),
}
DRAWS = {
    "model.decoder.init_std": ([], "0.01"),
    "model.encoder.init_std": ([], "0.01"),
    "model.projector.init_std": ([], "0.01"),
    "train.seed": ([], "7"),
}
RATES = {
    "optimizer.lr": ([], "1e-4"),
    "optimizer.min_lr": ([], "1e-4"),
    "optimizer.warmup_fraction": ([], "0.5"),
    "train.steps": ([], "40"),
    "train.tokens": ([], "40960"),
    "train.samples": (["data.packing=false"], "80"),
}
READ: dict[str, tuple[list[str], str]] = {
    "data.root": ([], "nowhere"),
    "data.blend": ([], "{text: 1, code: 1}"),
    "data.blend_file": ([], str(LAPTOP / "blends/stage3.yaml")),
    "data.blend_unit": (["data.blend={captions: 1, text: 1}"], "tokens"),
    "data.epochs": (["data.blend={captions: 1, text: 1}"], "{captions: 0.05}"),
    "data.when_source_ends": (
        ["data.blend={captions: 1, text: 1}", "data.epochs={captions: 0.02}"], "stop"
    ),
    "data.sequence_length": ([], "1024"),
    "data.tile_size": ([IMAGES], "32"),
    "data.max_tiles": ([IMAGES], "2"),
    "data.tiling": ([IMAGES], "native_matched"),
    "data.min_patches": ([IMAGES, *WHOLE], "800"),
    "data.max_patches": ([IMAGES, *WHOLE], "64"),
    "data.video.fps": ([CLIPS], "1.0"),
    "data.video.min_frames": ([CLIPS, "data.video.fps=0.1"], "4"),
    "data.video.max_frames": ([CLIPS, "data.video.min_frames=1"], "2"),
    "data.video.labels": ([CLIPS], "joined"),
    "data.video.evs_rate": ([CLIPS], "[0.5]"),
    "data.packing": ([], "false"),
    "data.packing_window": ([], "17"),
    "data.document_alignment": ([], "16"),
    "data.packer": ([], "greedy_knapsack"),
    "data.spare_packs": (["data.packer=balanced"], "4"),
    "data.max_tiles_per_pack": ([IMAGES, "data.max_tiles=2"], "3"),
    "data.max_samples_per_pack": ([], "2"),
    "data.order": ([], "random"),
    "data.aligned_packs": (["train.global_batch=8"], "2"),
    "train.global_batch": ([], "2"),
}  # fmt: skip
LOADS = {
    "data.workers": ([], "3"),
    "data.prefetch": ([], "1"),
    "data.max_bad_fraction": ([], "0.5"),
}
PLANNED: dict[str, tuple[list[str], str]] = {
    "carry.weights": ([], "random"),
    "carry.fresh": ([], "[projector]"),
    "carry.optimizer": ([], "true"),
    "carry.data_cursor": ([], "true"),
    "name": ([], "other"),
}
GATE = ["gate.reference=init", "gate.rise_at_most={loss: 9}"]
CHAINED: dict[str, tuple[list[str], str]] = {"after": ([], "init")}
JUDGED: dict[str, tuple[list[str], str]] = {
    "gate.at_least": ([], "{loss: 5}"),
    "gate.at_most": ([], "{loss: 1}"),
    "gate.drop_at_most": (GATE, "{loss: 0.5}"),
    "gate.rise_at_most": (["gate.reference=stage0", "gate.drop_at_most={loss: 9}"], "{loss: 0.5}"),
    "gate.reference": (["gate.reference=init", "gate.rise_at_most={loss: 0.5}"], "stage0"),
    "gate.otherwise": (["gate.at_most={loss: 1}"], "continue"),
    "gate.branch_to": (
        ["gate.at_most={loss: 1}", "gate.otherwise=branch", "gate.branch_to=stage2"], "stage3"
    ),
}  # fmt: skip
LOOKED_AT = {"evaluation.longest_pack": (["evaluation.packs=2"], "512")}
STUDENT = ["distill.student=nvfp4", "precision=bf16"]
TAUGHT: dict[str, tuple[list[str], str]] = {
    "distill.temperature": (STUDENT, "2.0"),
    "distill.calibration_batches": (STUDENT, "3"),
}
KEPT = {"distill.student": (["precision=bf16"], "nvfp4")}
TABLES: list[tuple[Observer, dict[str, tuple[list[str], str]], list[str]]] = [
    (observers.built, BUILT, SHALLOW),
    (observers.drawn, DRAWS, SHALLOW),
    (observers.rates, RATES, []),
    (observers.packs, READ, PACKS),
    (observers.loader, LOADS, PACKS),
    (observers.plan, PLANNED, []),
    (observers.memory, KEPT, []),
    (chain_observers.chain, CHAINED, []),
    (chain_observers.verdict, JUDGED, []),
    (chain_observers.sets, LOOKED_AT, []),
    (chain_observers.taught, TAUGHT, [*SHALLOW, *PACKS]),
]
LOOP = {
    "train.threads": ("threads", "2"),
    "train.peak_tflops": ("mfu", "1.0"),
    "fp8.drift_every": ("drift", "1"),
    "evaluation.every": ("evaluations", "1"),
    "evaluation.batches": ("first_loss", "2"),
    "evaluation.packs": ("sets", "1"),
    "checkpoint.every": ("checkpoints", "1"),
    "checkpoint.optimizer": ("last_optimizer", "false"),
    "checkpoint.any_layout": ("saver", "true"),
    "checkpoint.async_save": ("saver", "false"),
}
"""What a run of two steps shows, as `loop_facts` names it."""
PREPARED = {
    "data.builder": ("none", "data.builder is none"),
    "data.tokenizer": ("no/such/tokenizer.json", "no/such/tokenizer.json"),
}
"""Keys that `mvl data prepare` reads, and what it says of a value that it cannot serve."""
REFUSED = {
    "parallel.virtual_pipeline": ("2", "refuses interleaved pipelines"),
    "model.vocab_size": ("1000000", "must be at least model.vocab_size"),
}
"""Keys with one valid value, or that other values are held against."""
UNREAD: dict[str, tuple[Observer, list[str]]] = {
    "fp8.first_layers_bf16": (observers.built, SHALLOW),
    "fp8.last_layers_bf16": (observers.built, SHALLOW),
    "fp8.keep_bf16": (observers.built, SHALLOW),
    "fp8.amax_history": (observers.built, [*SHALLOW, *FP8]),
    "recompute.kinds": (observers.built, SHALLOW),
    "recompute.encoder": (observers.kept, ["train.trainable=[projector]"]),
    "gate.otherwise": (chain_observers.verdict, []),
    "data.min_patches": (observers.packs, [*PACKS, IMAGES]),
    "data.max_patches": (observers.packs, [*PACKS, IMAGES, "data.tiling=native_matched"]),
    "data.packer": (observers.packs, [*PACKS, "data.packing=false"]),
    "data.max_samples_per_pack": (observers.packs, [*PACKS, "data.packing=false"]),
    "data.spare_packs": (observers.packs, PACKS),
    "data.aligned_packs": (observers.packs, [*PACKS, "data.order=random"]),
    "distill.temperature": (chain_observers.taught, [*SHALLOW, *PACKS]),
    "distill.calibration_batches": (chain_observers.taught, [*SHALLOW, *PACKS]),
}
"""Keys that a stage with these settings does not read: changed behind the checks, they must change
nothing. `fp8.drift_every` is not among them: only a run of several steps would show it."""
CASES = [
    pytest.param(observer, base, value, key, id=key)
    for observer, table, common in TABLES
    for key, (own, value) in table.items()
    for base in [[*common, *own]]
]


def test_every_key_is_in_one_table() -> None:
    named = [key for _, table, _ in TABLES for key in table]
    named += [*LOOP, *PREPARED, *REFUSED]
    assert sorted(named) == sorted(leaf_fields())


@functools.cache
def seen(observer: Observer, overrides: tuple[str, ...]) -> Any:
    """What an observer sees; keys that share a base share it."""
    return observer(load_stage(STAGE, overrides))


@pytest.mark.parametrize(("observer", "base", "value", "key"), CASES)
def test_a_changed_key_changes_what_is_seen(
    small_data: SmallData, observer: Observer, base: list[str], value: str, key: str
) -> None:
    before = (small_data.override, *base)
    after = (*before, f"{key}={value}")
    changed = differences(load_stage(STAGE, before), load_stage(STAGE, after))
    assert key == "data.blend_file" or key in changed
    assert seen(observer, before) != seen(observer, after)


@pytest.mark.parametrize(("observer", "table", "common"), TABLES)
def test_what_is_seen_is_of_the_config_alone(
    small_data: SmallData, observer: Observer, table: Any, common: list[str]
) -> None:
    """Nothing changes where no key does; otherwise a clock would pass for an effect."""
    overrides = (small_data.override, *common)
    assert observer(load_stage(STAGE, overrides)) == seen(observer, overrides)


def test_every_declared_condition_is_looked_at() -> None:
    assert set(UNREAD) == set(CONDITIONS) - {"fp8.drift_every"}


@pytest.mark.parametrize("key", UNREAD)
def test_a_key_that_is_declared_unread_changes_nothing(small_data: SmallData, key: str) -> None:
    observer, base = UNREAD[key]
    own, value = next(table[key] for _, table, _ in TABLES if key in table)
    common = next(common for _, table, common in TABLES if key in table)
    read = load_stage(STAGE, [small_data.override, *common, *own, f"{key}={value}"])
    overrides = (small_data.override, *base)
    config = load_stage(STAGE, overrides)
    section, _, name = key.rpartition(".")
    assert not CONDITIONS[key].holds(config)
    assert value_of(config, key) != value_of(read, key)
    setattr(value_of(config, section), name, value_of(read, key))
    assert observer(config) == seen(observer, overrides)


@pytest.mark.distributed
def test_keys_of_the_loop(ranks: RankPool, small_data: SmallData, tmp_path: Path) -> None:
    common = [small_data.override, *TINY, *FP8, "train.steps=2", "train.threads=1"]
    common += ["evaluation.every=0", "evaluation.packs=0", "evaluation.batches=1"]
    changed = [f"{key}={value}" for key, (_, value) in LOOP.items()]
    (before,) = ranks.run(1, loop_facts, DRAWN, common, tmp_path / "before")
    (after,) = ranks.run(1, loop_facts, DRAWN, [*common, *changed], tmp_path / "after")
    for key, (fact, _) in LOOP.items():
        assert before[fact] != after[fact], key


@pytest.mark.parametrize("key", PREPARED)
def test_keys_of_the_preparation(
    key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value, why = PREPARED[key]
    root = f"data.root={tmp_path / 'data'}"
    assert main(["data", "prepare", str(DRAWN), root, f"{key}={value}"]) == exit_codes.USAGE
    assert why in capsys.readouterr().err


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_with_one_valid_value(key: str) -> None:
    value, why = REFUSED[key]
    with pytest.raises(ConfigError, match=why):
        load_stage(STAGE, [f"{key}={value}"])
