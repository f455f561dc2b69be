"""Frozen parts and micro-batches without pictures: no hang, and the gradients of one rank."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from megatron_vl.config.load import load_stage, to_yaml
from megatron_vl.config.schema import Part
from megatron_vl.model.vlm import part_of
from megatron_vl.run.folder import RunFolder
from megatron_vl.train.checkpoint import full_tensors, step_folder
from tests.conftest import LAPTOP, TINY, SmallData
from tests.support.gradients import (
    RankGradients,
    assert_equal_gradients,
    batch_gradients,
    distance,
)
from tests.support.ranks import RankFailed, RankPool
from tests.train.stage_jobs import run_stage

pytestmark = pytest.mark.distributed

FILE = LAPTOP / "stage1.yaml"
COMMON = ["data.sequence_length=256"]
ALL = "encoder,projector,decoder"
LAYOUTS = {
    "TP2-SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2": ["parallel.pipeline=2"],
    "DP2": ["parallel.data=2"],
    "PP2-DP2": ["parallel.pipeline=2", "parallel.data=2"],
}
# Two data-parallel ranks take the first and third pack, and the second and fourth.
BATCHES = {
    "with-and-without": ["text", "pictures", "pictures", "text"],
    "one-rank-has-text-alone": ["pictures", "text", "pictures", "text"],
    "text-alone": ["text", "text"],
}
_references: dict[tuple[str, str], RankGradients] = {}


def reference(ranks: RankPool, batch: str, trainable: str) -> RankGradients:
    """The same batch on one rank; computed once."""
    if (batch, trainable) not in _references:
        overrides = [*COMMON, "parallel.data=1", f"train.trainable=[{trainable}]"]
        found = ranks.run(1, batch_gradients, FILE, overrides, BATCHES[batch])[0]
        _references[batch, trainable] = found
    return _references[batch, trainable]


# What one rank holds of the pictures, and what learns, at every layout; a few of them quickly.
CASES = [
    ("with-and-without", ALL),
    ("one-rank-has-text-alone", ALL),
    ("one-rank-has-text-alone", "projector"),
    ("one-rank-has-text-alone", "projector,decoder"),
    ("with-and-without", "decoder"),
    ("text-alone", "encoder,projector"),
    ("text-alone", ALL),
]
QUICK = {
    ("TP2-SP", *CASES[0]),
    ("DP2", *CASES[1]),
    ("DP2", *CASES[2]),
    ("PP2", *CASES[2]),
    ("PP2", *CASES[5]),
    ("DP2", *CASES[6]),
    ("PP2-DP2", *CASES[3]),
}


def cases() -> Iterator[Any]:
    for case in itertools.product(LAYOUTS, CASES):
        layout, (batch, trainable) = case
        quick = (layout, batch, trainable) in QUICK
        yield pytest.param(layout, batch, trainable, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(("layout", "batch", "trainable"), cases())
def test_gradients_are_those_of_one_rank(
    ranks: RankPool, layout: str, batch: str, trainable: str
) -> None:
    alone = reference(ranks, batch, trainable)
    overrides = ["parallel.data=1", *LAYOUTS[layout], f"train.trainable=[{trainable}]"]
    size = 4 if layout == "PP2-DP2" else 2
    together = ranks.run(size, batch_gradients, FILE, [*COMMON, *overrides], BATCHES[batch])
    if "DP2" in layout and batch == "one-rank-has-text-alone":
        shown = {tuple(count > 0 for count in rank.tiles) for rank in together}
        assert shown == {(True, True), (False, False)}
    gradients = assert_equal_gradients(together, alone)
    norms = {key: float(gradient.norm()) for key, gradient in gradients.items()}
    assert {part_of(key).value for key in norms} == set(trainable.split(","))
    for key, norm in norms.items():
        unseen = batch == "text-alone" and part_of(key) is not Part.decoder
        assert (norm == 0) == unseen, key


def make_run(path: Path, small_data: SmallData, stages: dict[str, list[str]]) -> None:
    """A run folder of stages that take one step each, by name, with their overrides."""
    run = RunFolder(path)
    run.create({"stages": [{"name": name, "folder": name} for name in stages]})
    common = [small_data.override, *TINY, "train.steps=1", "evaluation.every=0"]
    for stage in run.stages():
        text = to_yaml(load_stage(LAPTOP / f"{stage.name}.yaml", [*common, *stages[stage.name]]))
        stage.config_path.write_text(text)


def moments(path: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor], set[str]]:
    """First and second moments by the stored name of their weight, and all weights' names."""
    tensors = full_tensors(step_folder(RunFolder(path).stage(name).checkpoints, 1), optimizer=True)
    first, second = (
        {
            key.removeprefix(prefix): tensor
            for key, tensor in tensors.items()
            if key.startswith(prefix)
        }
        for prefix in ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.")
    )
    assert first.keys() == second.keys()
    return first, second, {key for key in tensors if not key.startswith("optimizer.")}


def after_one_step(first: Tensor, second: Tensor, beta1: float, beta2: float) -> bool:
    """Whether the moments are those of one gradient alone, none before it."""
    gradient = first.double() / (1 - beta1)
    return distance(second, gradient**2 * (1 - beta2)) < 1e-5


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([], id="one-rank"),
        pytest.param(["parallel.pipeline=2"], id="PP2", marks=pytest.mark.slow),
        pytest.param(["parallel.tensor=2"], id="TP2", marks=pytest.mark.slow),
    ],
)
def test_unfreezing_at_a_stage_border(
    ranks: RankPool, small_data: SmallData, tmp_path: Path, layout: list[str]
) -> None:
    """Stage 0 trains the projector, stage 1 all parts with state of their own, stage 2 goes on."""
    shared = [*layout, "optimizer.beta1=0.8", "optimizer.beta2=0.9"]
    stages = {
        "stage0": [*shared, "carry.weights=random", "carry.fresh=[]"],
        "stage1": [*shared, "carry.optimizer=false"],
        "stage2": [*shared, "carry.optimizer=true", "carry.fresh=[]", "data.blend={captions: 1}"],
    }
    make_run(tmp_path, small_data, stages)
    for name in stages:
        ranks.run(2 if layout else 1, run_stage, tmp_path, name)
    first, second, weights = moments(tmp_path, "stage0")
    assert first.keys() == {key for key in weights if part_of(key) is Part.projector}
    first, second, weights = moments(tmp_path, "stage1")
    assert first.keys() == weights
    # The second step has a gradient of its own in every tensor that has one at all.
    again = moments(tmp_path, "stage2")
    assert again[0].keys() == weights
    for key in weights:
        assert float(first[key].norm()) > 0, key
        assert after_one_step(first[key], second[key], 0.8, 0.9), key
        assert not after_one_step(again[0][key], again[1][key], 0.8, 0.9), key


@pytest.mark.slow
def test_moments_of_other_parts_are_refused(
    ranks: RankPool, small_data: SmallData, tmp_path: Path
) -> None:
    stages = {
        "stage0": ["carry.weights=random", "carry.fresh=[]"],
        "stage1": ["carry.optimizer=true"],
    }
    make_run(tmp_path, small_data, stages)
    ranks.run(1, run_stage, tmp_path, "stage0")
    with pytest.raises(RankFailed, match=r"it trained projector, this one trains decoder, encoder"):
        ranks.run(1, run_stage, tmp_path, "stage1")
