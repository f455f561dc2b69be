"""The causal convolution against F.conv1d run on each document by itself."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.kernels import conv1d
from megatron_vl.kernels.conv1d import causal_conv1d_fn, causal_conv1d_update

LENGTHS = [[1, 2, 1, 30, 3, 21], [40, 1, 1, 16]]


def inputs(dtype: torch.dtype, channels: int = 6, taps: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 58, channels, dtype=dtype).transpose(1, 2).requires_grad_()
    weight = torch.randn(channels, taps, dtype=dtype, requires_grad=True)
    return x, weight, torch.randn(channels, dtype=dtype, requires_grad=True)


def documents() -> Tensor:
    rows = [torch.repeat_interleave(torch.arange(len(n)), torch.tensor(n)) for n in LENGTHS]
    return torch.stack(rows).to(torch.int32)


def by_document(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    taps, rows = weight.shape[1], []
    for row, lengths in enumerate(LENGTHS):
        parts = x[row : row + 1].split(lengths, dim=2)
        padded = [F.pad(part, (taps - 1, 0)) for part in parts]
        rows.append(
            torch.cat([F.conv1d(p, weight[:, None], bias, groups=x.shape[1]) for p in padded], 2)
        )
    return torch.cat(rows)


@pytest.mark.parametrize("block", [1, 1 << 17])
@pytest.mark.parametrize("taps", [1, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_values_and_gradients_equal_separate_documents(
    block: int, taps: int, activation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(conv1d._BLOCK_ELEMENTS, "cpu", block)
    leaves = inputs(torch.float64, taps=taps)
    y = causal_conv1d_fn(*leaves, documents(), activation=activation)
    reference = by_document(*leaves)
    reference = F.silu(reference) if activation else reference
    assert isinstance(y, Tensor)
    torch.testing.assert_close(y, reference, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, weight)
    for one, other in zip(grads, torch.autograd.grad(reference, leaves, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_changed_document_leaves_its_neighbours_bitwise_equal(dtype: torch.dtype) -> None:
    x, weight, bias = inputs(dtype)
    other = x.detach().clone()
    ids = documents()
    inside = ids[0] == 3
    other[0, :, inside] = 7.0
    other.requires_grad_()
    results = []
    for source in (x, other):
        y = causal_conv1d_fn(source, weight, bias, ids, activation="silu")
        assert isinstance(y, Tensor)
        results.append((y, torch.autograd.grad(y.square().sum(), source)[0]))
    for one, two in zip(*results, strict=True):
        assert torch.equal(one[0][:, ~inside], two[0][:, ~inside])
        assert torch.equal(one[1], two[1])
        assert not torch.equal(one[0], two[0])


@pytest.mark.parametrize("frozen", [0, 1, 2])
def test_a_frozen_input_gets_no_gradient(frozen: int) -> None:
    leaves = inputs(torch.float32)
    expected = torch.autograd.grad(causal_conv1d_fn(*leaves, activation="silu").sum(), leaves)
    leaves[frozen].requires_grad_(False)
    causal_conv1d_fn(*leaves, activation="silu").sum().backward()
    for number, leaf in enumerate(leaves):
        assert leaf.grad is None if number == frozen else torch.equal(leaf.grad, expected[number])


def test_no_bias_and_no_documents() -> None:
    x, weight, _ = inputs(torch.float64)
    y = causal_conv1d_fn(x, weight)
    whole = F.conv1d(F.pad(x, (3, 0)), weight[:, None], groups=6)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("cut", [1, 2, 30])
def test_states_carry_a_sequence_over_a_cut(cut: int) -> None:
    x, weight, bias = inputs(torch.float64)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    first, state = causal_conv1d_fn(
        x[:, :, :cut], weight, bias, return_final_states=True, activation="silu"
    )
    second = causal_conv1d_fn(x[:, :, cut:], weight, bias, initial_states=state, activation="silu")
    torch.testing.assert_close(torch.cat([first, second], 2), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slots", [3, 4, 6])
@pytest.mark.parametrize("indexed", [False, True])
def test_decoding_equals_the_whole_sequence(slots: int, indexed: bool) -> None:
    x, weight, bias = inputs(torch.float64)
    whole = causal_conv1d_fn(x, weight, bias, activation="silu")
    state = torch.zeros(5 if indexed else 2, 6, slots, dtype=torch.float64)
    rows = torch.tensor([4, 2], dtype=torch.int32) if indexed else None
    steps = [
        causal_conv1d_update(x[:, :, t], state, weight, bias, "silu", conv_state_indices=rows)
        for t in range(40)
    ]
    rest = causal_conv1d_update(x[:, :, 40:], state, weight, bias, "silu", conv_state_indices=rows)
    y = torch.cat([torch.stack(steps, 2), rest], 2)
    torch.testing.assert_close(y, whole, rtol=1e-12, atol=1e-12)
    kept = state[[4, 2]] if indexed else state
    assert torch.equal(kept, x[:, :, -slots:])


def test_what_does_not_fit_is_refused() -> None:
    x, weight, bias = inputs(torch.float32)
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d_fn(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match="without seq_idx"):
        causal_conv1d_fn(x, weight, bias, documents(), return_final_states=True)
    with pytest.raises(ValueError, match="channels"):
        causal_conv1d_fn(x, weight[:3], bias)
    with pytest.raises(ValueError, match="ring-buffer"):
        causal_conv1d_update(x, x[:, :, :4], weight, cache_seqlens=torch.zeros(2))
    with pytest.raises(ValueError, match="taps need"):
        causal_conv1d_update(x, x[:, :, :2], weight)
