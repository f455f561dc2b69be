"""The torch core attention against a softmax written out in float64."""

import itertools
import math
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vl.config.schema import StageConfig
from megatron_vl.engine.packed import PackedSequence, packed_sequence
from megatron_vl.engine.torch_layers import CoreAttention
from megatron_vl.engine.transformer_configs import decoder_config
from megatron_vl.kernels.attention import QUERY_BLOCK, attend_segments
from megatron_vl.sequence.shards import causal_segments, shard, unshard

LENGTHS = (5, 1, 33, 17)
HEADS, WIDTH = 4, 16
BOUND = 2e-6


def core(config: StageConfig, *, causal: bool, scale: float | None = None) -> CoreAttention:
    mask = AttnMaskType.causal if causal else AttnMaskType.no_mask
    built = decoder_config(config.model, config.parallel, config.precision)
    return CoreAttention(built, 1, mask, "self", softmax_scale=scale)


def draw(groups: int, seed: int = 31) -> tuple[Tensor, Tensor, Tensor]:
    """Packed query, key and value: (T, N, D), (T, G, D), (T, G, D)."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(LENGTHS)
    return tuple(  # type: ignore[return-value]
        torch.randn(total, heads, WIDTH, generator=generator) for heads in (HEADS, groups, groups)
    )


def pack_of(lengths: tuple[int, ...]) -> PackedSequence:
    sizes = torch.tensor(lengths)
    ids = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), sizes)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
    return packed_sequence(ids, ends, max(lengths), torch.device("cpu"))


def written_out(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> Tensor:
    """softmax(QK^T scale)V of one document in float64, a loop over heads; (S, N*D)."""
    query, key, value = query.double(), key.double(), value.double()
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // key.shape[1])
        scores = query[:, head] @ key[:, shared].T * scale
        if causal:
            later = torch.ones_like(scores).triu(1).bool()
            scores = scores.masked_fill(later, -math.inf)
        heads.append(torch.softmax(scores, dim=-1) @ value[:, shared])
    return torch.cat(heads, dim=-1)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("groups", [1, 2, 4], ids=lambda groups: f"groups{groups}")
@pytest.mark.parametrize("scale", [None, 0.7], ids=["plain", "scaled"])
def test_packed_equals_the_softmax_of_each_document(
    config: StageConfig, causal: bool, groups: int, scale: float | None
) -> None:
    query, key, value = draw(groups)
    attention = core(config, causal=causal, scale=scale)
    ours = attention(query, key, value, None, packed_seq_params=pack_of(LENGTHS))
    assert ours.shape == (sum(LENGTHS), HEADS * WIDTH)
    documents = zip(*(t.split(LENGTHS) for t in (query, key, value)), strict=True)
    used = scale or WIDTH**-0.5
    for document, result in zip(documents, ours.split(LENGTHS), strict=True):
        assert relative(result, written_out(*document, causal, used)) < BOUND
        alone = attention(*(t.unsqueeze(1) for t in document), None)
        assert alone.shape == (len(document[0]), 1, HEADS * WIDTH)
        assert relative(result, alone.squeeze(1).double()) < BOUND


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_gradients_equal_those_of_the_softmax(config: StageConfig, causal: bool) -> None:
    ours = [t.requires_grad_() for t in draw(2)]
    exact = [t.detach().clone().requires_grad_() for t in ours]
    weights = torch.randn(sum(LENGTHS), HEADS * WIDTH, generator=torch.Generator().manual_seed(1))
    packed = core(config, causal=causal)(*ours, None, packed_seq_params=pack_of(LENGTHS))
    (packed * weights).sum().backward()
    documents = zip(*(t.split(LENGTHS) for t in exact), strict=True)
    results = [written_out(*document, causal, WIDTH**-0.5) for document in documents]
    (torch.cat(results) * weights).sum().backward()
    for one, other in zip(ours, exact, strict=True):
        assert relative(one.grad, other.grad.double()) < BOUND


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_a_document_does_not_see_its_neighbours(config: StageConfig, causal: bool) -> None:
    """New numbers in one document leave the results of the others equal in every bit."""
    attention, pack = core(config, causal=causal), pack_of(LENGTHS)
    before = attention(*draw(2), None, packed_seq_params=pack).split(LENGTHS)
    changed = [t.clone() for t in draw(2)]
    start = sum(LENGTHS[:2])
    for tensor, other in zip(changed, draw(2, seed=32), strict=True):
        tensor[start : start + LENGTHS[2]] = other[start : start + LENGTHS[2]]
    after = attention(*changed, None, packed_seq_params=pack).split(LENGTHS)
    for number, (one, other) in enumerate(zip(before, after, strict=True)):
        assert torch.equal(one, other) == (number != 2), number


def test_padding_is_not_attended(config: StageConfig) -> None:
    """Zeros for the last document, the same bits for the others."""
    sizes = torch.tensor(LENGTHS)
    ids = torch.repeat_interleave(torch.arange(len(LENGTHS), dtype=torch.int32), sizes)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)]).int()
    skipped = packed_sequence(ids, ends, max(LENGTHS), torch.device("cpu"), padding=True)
    attention = core(config, causal=True)
    whole = attention(*draw(2), None, packed_seq_params=pack_of(LENGTHS)).split(LENGTHS)
    ours = attention(*draw(2), None, packed_seq_params=skipped).split(LENGTHS)
    assert float(ours[-1].abs().max()) == 0
    for one, other in zip(ours[:-1], whole[:-1], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("size", [2, 3, 4])
def test_shards_of_context_ranks_make_the_whole(size: int) -> None:
    """Every rank's segments against keys of the pack, brought together in the pack's order."""
    lengths = [2 * size * chunk for chunk in (1, 7, 200, 3)]
    boundaries = [0, *itertools.accumulate(lengths)]
    generator = torch.Generator().manual_seed(33)
    query, key, value = (
        torch.randn(boundaries[-1], heads, WIDTH, generator=generator) for heads in (HEADS, 2, 2)
    )
    results = []
    for rank in range(size):
        segments = causal_segments(boundaries, size, rank, padding=False)
        places = torch.from_numpy(shard(boundaries, size, rank))
        results.append(
            attend_segments(
                query[places], key, value, boundaries, segments, causal=True, scale=None
            )
        )
    ours = torch.cat(results)[torch.from_numpy(unshard(boundaries, size))].flatten(1)
    documents = zip(*(t.split(lengths) for t in (query, key, value)), strict=True)
    for result, document in zip(ours.split(lengths), documents, strict=True):
        assert relative(result, written_out(*document, True, WIDTH**-0.5)) < BOUND


class Largest(TorchDispatchMode):
    """Notes the largest tensor any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("size", [1, 2])
def test_nothing_quadratic_is_made(size: int) -> None:
    """One document of 4,096 tokens: no tensor larger than a mask of QUERY_BLOCK rows."""
    length = 4096
    heads, width = 2, 8
    boundaries = (0, length)
    generator = torch.Generator().manual_seed(34)
    tensors = [
        torch.randn(count, heads, width, generator=generator).requires_grad_()
        for count in (length // size, length, length)
    ]
    segments = causal_segments(boundaries, size, 0, padding=False)
    with Largest() as largest:
        result = attend_segments(*tensors, boundaries, segments, causal=True, scale=None)
        result.sum().backward()
    bound = length * heads * width if size == 1 else QUERY_BLOCK * length
    assert 0 < largest.numbers <= bound
    assert bound < length**2 // size
