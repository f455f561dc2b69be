"""FLOPs against sums by hand, against torch's own counter, and against what must grow."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vl.cost.flops import PackFlops, pack_flops
from megatron_vl.cost.parameters import projector_matrices
from tests.support.sizes import full_size, small

ALL = {"encoder", "projector", "decoder"}


def count(pattern: str = "M-*", **changes: object) -> PackFlops:
    arguments: dict[str, object] = {
        "document_lengths": [3, 5],
        "padded_length": 10,
        "num_tiles": 2,
        "tile_size": 8,
        "trainable": ALL,
    }
    return pack_flops(small(pattern), **(arguments | changes))  # type: ignore[arg-type]


def test_decoder_by_hand() -> None:
    head = 2 * 12 * 4 * 10
    text = {"num_tiles": 0}
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
    decoder = count(num_tiles=0)
    flops = count()
    assert flops.forward == decoder.forward + embedding + layers + projector
    # Pixels need no gradient: the patch embedding has its weights' only.
    assert flops.backward == decoder.backward + embedding + 2 * layers + 2 * projector


def test_frozen_parts_cost_what_passes_through_them() -> None:
    decoder = count("-", num_tiles=0)
    weights = decoder.forward
    projector = 2 * 100 * 8
    assert count("-", trainable=set()).backward == 0
    # A frozen decoder behind a learning projector: activation gradients only.
    assert count("-", trainable={"projector"}).backward == weights + 2 * projector
    # Nothing before the decoder learns: encoder and projector have no backward at all.
    assert count("-", trainable={"decoder"}).backward == 2 * weights
    with_encoder = count("-", trainable={"encoder"}).backward
    assert with_encoder > weights + projector
    assert count("-", trainable={"projector"}, num_tiles=0).backward == 0
    assert len({count(trainable=t).forward for t in ({"decoder"}, {"projector"})}) == 1


def test_published_sizes() -> None:
    model = full_size()
    arguments = {"document_lengths": [256], "padded_length": 256, "tile_size": 512}
    with_tile = pack_flops(model, num_tiles=1, trainable=ALL, **arguments)  # type: ignore[arg-type]
    without = pack_flops(model, num_tiles=0, trainable=ALL, **arguments)  # type: ignore[arg-type]
    vision = with_tile.forward - without.forward
    assert 2 * projector_matrices(model) * 256 == pytest.approx(0.107e12, rel=0.01)
    assert vision == pytest.approx((1.49 + 0.107) * 1e12, rel=0.01)
    # Without embedding look-ups, 2 FLOPs a parameter and token, and a few per cent of scan.
    matrices = 12_310_001_152 - 131072 * 5120
    assert without.forward == pytest.approx(2 * matrices * 256, rel=0.03)


@pytest.mark.parametrize("trainable", [ALL, {"projector"}, {"decoder"}])
def test_torch_counts_the_same_products(trainable: set[str]) -> None:
    torch = pytest.importorskip("torch")
    from torch.nn.functional import linear
    from torch.utils.flop_counter import FlopCounterMode

    model = small("--")

    def matrix(part: str, rows: int, columns: int) -> "torch.Tensor":
        return torch.randn(rows, columns, requires_grad=part in trainable)

    def patches() -> "torch.Tensor":
        return torch.randn(8, 16)

    projector = [matrix("projector", 5, 16), matrix("projector", 4, 5)]
    scale = torch.ones(16, requires_grad="projector" in trainable)
    table = torch.randn(10, 4, requires_grad="decoder" in trainable)
    sizes = [(6, 4), (4, 6), (6, 4), (4, 6), (12, 4)]
    decoder = [matrix("decoder", *size) for size in sizes]
    with FlopCounterMode(display=False) as counter:
        image = linear(linear(patches() * scale, projector[0]).relu(), projector[1])
        hidden = torch.cat([image, table[:2]])
        for up, down in (decoder[:2], decoder[2:4]):
            hidden = hidden + linear(linear(hidden, up).relu(), down)
        linear(hidden, decoder[4]).sum().backward()
    ours = pack_flops(
        model,
        document_lengths=[10],
        padded_length=10,
        num_tiles=2,
        tile_size=8,
        trainable=trainable,
    )
    encoder = 2 * 12 * 4 * 32 + 2 * 2 * (2 * 128 * 18 + 16 * 18**2)
    encoder_backward = encoder * 2 - 2 * 12 * 4 * 32 if "encoder" in trainable else 0
    assert ours.total - encoder - encoder_backward == pytest.approx(
        counter.get_total_flops(), rel=0.01
    )


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
            "num_tiles": tiles,
            "trainable": trainable,
        }
        return count(**(base | changes))

    base = flops()
    longer = flops(document_lengths=[*lengths, 7], padded_length=sum(lengths) + pad + 7)
    assert longer.forward > base.forward
    assert longer.backward >= base.backward
    assert flops(num_tiles=tiles + 1).total > base.total
    assert flops(trainable=ALL).total >= base.total
    assert flops(document_lengths=[sum(lengths)]).total >= base.total


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document_lengths": [8, 3]}, "do not fit"),
        ({"trainable": {"vision"}}, "unknown parts"),
        ({"num_tiles": -1}, "not negative"),
        ({"tile_size": 6}, "2 patches"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**change)
