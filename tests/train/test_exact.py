"""Every layout against one rank that sees each document alone: losses, gradients, checkpoints.

Packs of images in tiles, images at their own odd resolution, videos pruned by EVS and text, each
document cut over all context ranks; the second pack of four is text alone. Float32.
"""

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron_vl.config.schema import Part
from megatron_vl.model.vlm import PART_PREFIXES
from megatron_vl.train.synthetic import Kind
from tests.conftest import LAPTOP
from tests.support.ranks import RankPool
from tests.train import exact_jobs

pytestmark = pytest.mark.distributed

STAGE = LAPTOP / "stage1.yaml"
# Each kind of layer on both halves of the pattern; two Mamba groups, which four ranks copy.
SMALL = [
    "precision=fp32",
    "parallel.data=1",
    "train.global_batch=4",
    "data.sequence_length=256",
    "data.document_alignment=8",
    "model.decoder.pattern=M*-M*-",
    "model.encoder.num_layers=2",
]
AXES = {"TP": "tensor", "PP": "pipeline", "CP": "context", "DP": "data"}
PROCESSES = 4
LOSS_BOUND, GRADIENT_BOUND = 1e-5, 1e-4


def layouts() -> list[str]:
    """Every layout of the grid that fits the processes, as in `TP2-SP-CP2`."""
    names = []
    for tensor, pipeline, context, data in product((1, 2), (1, 2), (1, 2, 4), (1, 2)):
        if tensor * pipeline * context * data > PROCESSES:
            continue
        sizes = {"TP": tensor, "PP": pipeline, "CP": context, "DP": data}
        name = "-".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1)
        names.append(name or "one")
        if tensor > 1:
            names.append(name.replace("TP2", "TP2-SP"))
    return names


def overrides_of(layout: str) -> tuple[int, list[str]]:
    """Processes of a layout, and what to set for it."""
    ranks, overrides = 1, []
    for word in layout.split("-"):
        if word == "SP":
            overrides.append("parallel.sequence=true")
        elif word != "one":
            ranks *= int(word[2:])
            overrides.append(f"parallel.{AXES[word[:2]]}={word[2:]}")
    return ranks, overrides


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each gradient within the bound; what nobody learns is zero on both sides."""
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        error, norm = float((found[key] - gradient).norm()), float(gradient.norm())
        assert error <= GRADIENT_BOUND * norm, f"{key}: {error / max(norm, 1e-30):.1e}"


def assert_exact(
    ranks: RankPool,
    layout: str,
    reference: tuple[float, dict[str, Tensor]],
    *overrides: str,
    kinds: tuple[Kind, ...] = tuple(Kind),
) -> list[exact_jobs.Batch]:
    size, wanted = overrides_of(layout)
    batches = ranks.run(size, exact_jobs.batch, STAGE, [*SMALL, *overrides, *wanted], kinds)
    loss, gradients = reference
    for batch in batches:
        assert batch.loss == pytest.approx(loss, rel=LOSS_BOUND)
    assert_equal(exact_jobs.joined(batches), gradients)
    return batches


@pytest.fixture(scope="module")
def reference(ranks: RankPool) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of the documents alone; every parameter has a gradient."""
    loss, gradients = ranks.run(1, exact_jobs.alone, STAGE, SMALL)[0]
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())
    return loss, gradients


@pytest.mark.parametrize("layout", layouts())
def test_a_layout_is_exact(
    ranks: RankPool, reference: tuple[float, dict[str, Tensor]], layout: str
) -> None:
    assert_exact(ranks, layout, reference)


def test_the_grid_is_whole() -> None:
    assert len(layouts()) == 16
    assert {"CP4", "TP2-SP-CP2", "PP2-CP2", "CP2-DP2", "TP2-SP-PP2", "TP2-SP-DP2"} <= set(layouts())


@pytest.mark.parametrize("trainable", ["projector", "encoder", "decoder", "projector,decoder"])
def test_frozen_parts_under_context_parallelism(
    ranks: RankPool, reference: tuple[float, dict[str, Tensor]], trainable: str
) -> None:
    """No graph where nothing learns, and yet the same messages on every rank."""
    loss, gradients = reference
    prefixes = tuple(PART_PREFIXES[Part[part]] for part in trainable.split(","))
    expected = {
        key: gradient if key.startswith(prefixes) else torch.zeros_like(gradient)
        for key, gradient in gradients.items()
    }
    assert_exact(ranks, "CP4", (loss, expected), f"train.trainable=[{trainable}]")


@pytest.mark.parametrize("layout", ["CP2", "CP2-DP2"])
def test_a_batch_without_images(ranks: RankPool, layout: str) -> None:
    kinds = (Kind.text,)
    reference = ranks.run(1, exact_jobs.alone, STAGE, SMALL, kinds)[0]
    batches = assert_exact(ranks, layout, reference, kinds=kinds)
    assert {batch.units for batch in batches} == {0}


def test_one_picture_for_four_ranks(ranks: RankPool) -> None:
    """Three of them encode a blank one; one data-parallel rank of two has text alone."""
    kinds, one = (Kind.native, Kind.text), ("train.global_batch=2", "data.sequence_length=104")
    reference = ranks.run(1, exact_jobs.alone, STAGE, [*SMALL, *one], kinds)[0]
    for layout in ("CP4", "CP2-DP2"):
        batches = assert_exact(ranks, layout, reference, *one, kinds=kinds)
        assert sorted({batch.units for batch in batches}) == ([1] if layout == "CP4" else [0, 1])


@pytest.mark.parametrize("layout", ["CP2", "TP2-SP-CP2"])
def test_recompute_sends_its_messages_again(
    ranks: RankPool, reference: tuple[float, dict[str, Tensor]], layout: str
) -> None:
    """Layers that exchange with other ranks, run twice."""
    assert_exact(ranks, layout, reference, "recompute.decoder=6", "recompute.encoder=2")


@pytest.mark.parametrize(
    ("layout", "overrides"),
    [
        ("PP2-CP2", ["model.decoder.pattern=M*M---"]),
        ("PP2", ["model.decoder.pattern=M-*M-", "parallel.first_stage_layers=1"]),
    ],
)
def test_stages_of_one_kind_and_of_unequal_length(
    ranks: RankPool, layout: str, overrides: list[str]
) -> None:
    """The last stage is MLP layers alone; the first is one layer, beside the encoder."""
    whole = [override for override in overrides if "pattern" in override]
    reference = ranks.run(1, exact_jobs.alone, STAGE, [*SMALL, *whole])[0]
    assert_exact(ranks, layout, reference, *overrides)


@pytest.mark.parametrize("layout", ["TP2-SP-CP2", "CP2-DP2"])
def test_steps_follow_those_of_one_rank(ranks: RankPool, layout: str) -> None:
    """Losses and gradient norms of three steps: clipping and the sharded optimizer take part."""
    (expected,) = ranks.run(1, exact_jobs.three_steps, STAGE, SMALL)
    size, wanted = overrides_of(layout)
    for numbers in ranks.run(size, exact_jobs.three_steps, STAGE, [*SMALL, *wanted]):
        assert numbers == pytest.approx(expected, rel=GRADIENT_BOUND)


@pytest.mark.slow
def test_a_checkpoint_leaves_and_enters_context_parallelism(
    ranks: RankPool, tmp_path: Path
) -> None:
    """Saved at TP2-CP2, gone on with on one rank and at CP4: the same losses and norms."""
    folder = tmp_path / "step_000001"
    size, wanted = overrides_of("TP2-CP2")
    straight = ranks.run(size, exact_jobs.three_steps, STAGE, [*SMALL, *wanted], folder)
    for numbers in straight[1:]:
        assert numbers == straight[0]
    for layout in ("one", "CP4"):
        size, wanted = overrides_of(layout)
        resumed = ranks.run(size, exact_jobs.two_more_steps, STAGE, [*SMALL, *wanted], folder)
        for numbers in resumed:
            assert numbers == pytest.approx(straight[0][2:], rel=GRADIENT_BOUND), layout
