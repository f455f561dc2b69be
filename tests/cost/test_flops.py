"""FLOPs against sums by hand and against what must grow; `test_counter.py` runs the model."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.config.schema import ParallelConfig, RecomputeConfig
from megatron_vl.config.schema_model import LayerKind
from megatron_vl.cost.flops import PackFlops, flops_by_kind, pack_flops
from megatron_vl.cost.parameters import projector_matrices
from megatron_vl.cost.recompute import Recomputed, recomputed_layers
from tests.support.sizes import PATTERN_12B, full_size, small

ALL = {"encoder", "projector", "decoder"}


def count(pattern: str = "M-*", **changes: object) -> PackFlops:
    arguments: dict[str, object] = {
        "document_lengths": [3, 5],
        "padded_length": 10,
        "grids": [(4, 4), (4, 4)],
        "trainable": ALL,
    }
    return pack_flops(small(pattern), **(arguments | changes))  # type: ignore[arg-type]


def test_decoder_by_hand() -> None:
    head = 2 * 12 * 4 * 10
    text: dict[str, object] = {"grids": []}
    assert count("-", **text).forward == head + 2 * 48 * 10
    assert count("*", **text).forward == head + 2 * 72 * 10 + 2 * 6 * (9 + 25)
    scan = 8 * (2 * 3 + 8) + 4 * 8 * 3
    assert count("M", **text).forward == head + (2 * (40 * 4 + 4 * 20) + scan) * 10
    for pattern in "-*M":
        flops = count(pattern, **text)
        assert flops.backward == 2 * flops.forward
        assert flops.total == 3 * flops.forward


def test_encoder_and_projector_by_hand() -> None:
    # Two tiles of 4 x 4 patches and 2 prefix tokens; 4 projected tokens a tile.
    embedding = 2 * 12 * 4 * 32
    layers = 2 * 2 * (2 * (64 + 64) * 18 + 4 * 4 * 18**2)
    projector = 2 * 100 * 8
    decoder = count(grids=[])
    flops = count()
    assert flops.forward == decoder.forward + embedding + layers + projector
    # Pixels need no gradient: the patch embedding has its weights' only.
    assert flops.backward == decoder.backward + embedding + 2 * layers + 2 * projector


def test_frozen_parts_cost_what_passes_through_them() -> None:
    decoder = count("-", grids=[])
    weights = decoder.forward
    first, second = 2 * 16 * 5 * 8, 2 * 5 * 4 * 8
    assert count("-", trainable=set()).backward == 0
    # A frozen decoder behind a learning projector: activation gradients only. Nothing learns before
    # the projector, so its first matrix has its own gradient alone.
    assert count("-", trainable={"projector"}).backward == weights + first + 2 * second
    # Nothing before the decoder learns: encoder and projector have no backward at all.
    assert count("-", trainable={"decoder"}).backward == 2 * weights
    with_encoder = count("-", trainable={"encoder"}).backward
    assert with_encoder > weights + first + second
    assert count("-", trainable={"projector"}, grids=[]).backward == 0
    assert len({count(trainable=t).forward for t in ({"decoder"}, {"projector"})}) == 1


def test_published_sizes() -> None:
    model = full_size()
    arguments = {"document_lengths": [256], "padded_length": 256, "trainable": ALL}
    with_tile = pack_flops(model, grids=[(32, 32)], **arguments)  # type: ignore[arg-type]
    without = pack_flops(model, grids=[], **arguments)  # type: ignore[arg-type]
    vision = with_tile.forward - without.forward
    assert 2 * projector_matrices(model) * 256 == pytest.approx(0.107e12, rel=0.01)
    assert vision == pytest.approx((1.49 + 0.107) * 1e12, rel=0.01)
    # Without embedding look-ups, 2 FLOPs a parameter and token, and a few per cent of scan.
    matrices = 12_310_001_152 - 131072 * 5120
    assert without.forward == pytest.approx(2 * matrices * 256, rel=0.03)


def test_odd_grids_are_padded_for_the_projector_alone() -> None:
    # 3 x 5 patches: 15 in the encoder, 2 x 3 embeddings in the projector; squares a picture.
    text, odd, both = (
        count("-", grids=grids).forward for grids in ([], [(3, 5)], [(3, 5), (4, 4)])
    )
    embedding = 2 * 12 * 4 * 15
    layers = 2 * (2 * (64 + 64) * 17 + 4 * 4 * 17**2)
    assert odd - text == embedding + layers + 2 * 100 * 6
    assert both - odd == count("-", grids=[(4, 4)]).forward - text


def test_recomputed_layers_run_once_more_where_there_is_a_backward_pass() -> None:
    plain = count("M-*-")
    twice = count("M-*-", recomputed=Recomputed("-*", encoder=1))
    assert (twice.forward, twice.backward) == (plain.forward, plain.backward)
    mlp, attention = 2 * 48 * 10, 2 * 72 * 10 + 2 * 6 * (9 + 25)
    encoder = 2 * (2 * (64 + 64) * 18 + 4 * 4 * 18**2)
    assert twice.repeated - plain.repeated == mlp + attention + encoder
    assert twice.hardware == twice.total + twice.repeated
    assert count("M-*-", trainable=set(), recomputed=Recomputed("M-*-", 2)).repeated == 0
    frozen = {"trainable": {"decoder"}}
    behind = count("M-*-", recomputed=Recomputed("", 2), **frozen)
    assert behind == count("M-*-", **frozen)


def test_what_runs_beyond_the_model_without_recompute() -> None:
    # Logits once more; inside the scan the scores and what comes through the state.
    head, scan = 2 * 12 * 4 * 10, (8 * 2 * 3 + 2 * 8 * 3) * 10
    assert count("-", grids=[]).repeated == head
    assert count("M", grids=[]).repeated == head + scan
    # Gradients of pixels, and of a frozen encoder's output, that nobody reads.
    pixels, shuffled = 2 * 12 * 4 * 32, 2 * 16 * 5 * 8
    assert count("-").repeated == head + pixels
    assert count("-", trainable={"projector"}).repeated == head + shuffled


def test_the_kinds_add_up() -> None:
    arguments = {"document_lengths": [3, 5], "padded_length": 10, "grids": [(4, 4)]}
    kinds = flops_by_kind(small(), trainable=ALL, **arguments)  # type: ignore[arg-type]
    assert sum(kinds.values(), PackFlops()) == count(grids=[(4, 4)])
    assert all(flops.forward > 0 for flops in kinds.values())


@pytest.mark.parametrize(
    ("pipeline", "first", "layers", "expected"),
    [
        (1, 0, 4, "M-M-"),
        (1, 0, 62, PATTERN_12B),
        # Stages of 14 and three times 16 layers.
        (4, 14, 3, PATTERN_12B[:3] + PATTERN_12B[14:17] + PATTERN_12B[30:33] + PATTERN_12B[46:49]),
        (2, 0, 2, PATTERN_12B[:2] + PATTERN_12B[31:33]),
    ],
)
def test_layers_are_counted_from_the_first_of_each_stage(
    pipeline: int, first: int, layers: int, expected: str
) -> None:
    parallel = ParallelConfig(pipeline=pipeline, first_stage_layers=first)
    found = recomputed_layers(full_size(), parallel, RecomputeConfig(layers, 7))
    assert found == Recomputed(expected, 7)
    only = RecomputeConfig(layers, 0, [LayerKind.mamba])
    assert recomputed_layers(full_size(), parallel, only).decoder == "M" * expected.count("M")


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=1, max_size=5),
    pad=st.integers(0, 20),
    tiles=st.integers(0, 3),
    trainable=st.sets(st.sampled_from(sorted(ALL))),
)
def test_more_work_never_costs_less(
    lengths: list[int], pad: int, tiles: int, trainable: set[str]
) -> None:
    def flops(**changes: object) -> PackFlops:
        base: dict[str, object] = {
            "document_lengths": lengths,
            "padded_length": sum(lengths) + pad,
            "grids": [(4, 4)] * tiles,
            "trainable": trainable,
        }
        return count(**(base | changes))

    base = flops()
    longer = flops(document_lengths=[*lengths, 7], padded_length=sum(lengths) + pad + 7)
    assert longer.forward > base.forward
    assert longer.backward >= base.backward
    assert flops(grids=[(4, 4)] * (tiles + 1)).total > base.total
    assert flops(trainable=ALL).total >= base.total
    assert flops(document_lengths=[sum(lengths)]).total >= base.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_lengths": [8, 3]}, "do not fit"),
        ({"trainable": {"vision"}}, "unknown parts"),
        ({"grids": [(4, 4), (0, 4)]}, "at least one row"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**change)
