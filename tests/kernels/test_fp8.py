"""FP8 quantizers against the definition of the formats, products against exact sums."""

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vl.kernels import fp8
from megatron_vl.kernels.fp8 import E4M3, E5M2, Quantized
from tests.kernels import float8

SHAPES = [(1, 1), (3, 128), (7, 130), (130, 257), (256, 384)]
WHOLE = 10**9
KINDS: dict[str, tuple[Callable[..., Quantized], tuple[int, int]]] = {
    "tensor": (fp8.quantize_tensor, (WHOLE, WHOLE)),
    "rows": (fp8.quantize_rows, (1, 128)),
    "squares": (fp8.quantize_squares, (128, 128)),
}


def drawn(shape: tuple[int, int], case: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(shape[1])
    x = torch.randn(shape, generator=generator)
    if case == "outliers":
        x[torch.rand(shape, generator=generator) < 0.01] *= 3e4
    if case == "zeros":
        x[torch.rand(shape, generator=generator) < 0.6] = 0
        x[: shape[0] // 2] = 0
    if case == "tiny":
        x *= 2.0**-118
    if case == "huge":
        x *= 2.0**120
    if case == "wide":
        x *= torch.exp2(torch.randint(-40, 40, shape, generator=generator))
    return x.to(dtype)


def assert_same(quantized: Quantized, data: np.ndarray, inverse: np.ndarray) -> None:
    assert np.array_equal(quantized.data_RK.view(torch.uint8).numpy(), data)
    stored = quantized.inverse.double().numpy()
    assert np.array_equal(stored.reshape(inverse.shape), inverse)


@pytest.mark.parametrize("case", ["normal", "outliers", "zeros", "tiny", "huge", "wide"])
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("target", [E4M3, E5M2], ids=["e4m3", "e5m2"])
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_and_scales_are_those_of_the_definition(
    kind: str, target: torch.dtype, source: torch.dtype, case: str
) -> None:
    quantize, block = KINDS[kind]
    for shape in SHAPES:
        x = drawn(shape, case, source)
        assert_same(quantize(x, target), *float8.quantize(x, target, block))


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_a_foreign_amax_saturates(target: torch.dtype) -> None:
    """Delayed scaling: the scale was made for smaller numbers, or for larger ones."""
    x = drawn((40, 200), "outliers", torch.bfloat16)
    for amax in (0.5, 3.0, 7e4):
        quantized = fp8.quantize_tensor(x, target, torch.tensor(amax))
        assert_same(quantized, *float8.quantize(x, target, (WHOLE, WHOLE), amax))
    clipped = fp8.quantize_tensor(x, target, torch.tensor(0.5)).dequantized()
    assert 0.5 <= float(clipped.abs().max()) < 1.0 < float(x.abs().max())


@given(
    amax=st.floats(2.0**-110, 2.0**127, width=32),
    target=st.sampled_from([E4M3, E5M2]),
)
@settings(max_examples=300, deadline=None)
def test_a_scale_is_the_largest_power_of_two_in_range(amax: float, target: torch.dtype) -> None:
    scale = float(fp8.power_of_two_scale(torch.tensor(amax), target))
    assert math.frexp(scale)[0] == 0.5
    assert amax * scale <= fp8.LARGEST[target] < 2 * amax * scale


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_value_breaks_its_block(kind: str, value: float) -> None:
    quantize, block = KINDS[kind]
    x = drawn((256, 384), "normal", torch.float32)
    x[130, 140] = value
    broken = quantize(x, E4M3).dequantized().isnan()
    expected = torch.zeros_like(broken)
    rows, columns = (130 // block[0] * block[0], 140 // block[1] * block[1])
    expected[rows : rows + block[0], columns : columns + block[1]] = True
    assert torch.equal(broken, expected)


@pytest.mark.parametrize("target", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_decoding_gives_torchs_values(target: torch.dtype) -> None:
    data = torch.arange(256).to(torch.uint8).view(target)
    expected = data.float()
    known = ~expected.isnan()
    assert torch.equal(fp8.decode(data)[known], expected[known])
    assert int(known.sum()) == (254 if target is E4M3 else 250)


def test_a_tensor_and_squares_can_be_turned() -> None:
    x = drawn((130, 257), "outliers", torch.bfloat16)
    for quantize in (fp8.quantize_tensor, fp8.quantize_squares):
        quantized = quantize(x, E4M3)
        turned = quantized.transposed()
        assert torch.equal(turned.dequantized(), quantized.dequantized().t())
        again = quantize(x.t(), E4M3)
        assert torch.equal(turned.data_RK.view(torch.uint8), again.data_RK.view(torch.uint8))
        assert torch.equal(turned.inverse, again.inverse)


def operands(recipe: str, rows: int, columns: int, depth: int) -> tuple[Quantized, Quantized]:
    generator = torch.Generator().manual_seed(rows)
    a = torch.randn(rows, depth, generator=generator) * 30
    b = torch.randn(columns, depth, generator=generator) / 50
    if recipe == "tensor":
        return fp8.quantize_tensor(a, E5M2), fp8.quantize_tensor(b, E4M3)
    second = fp8.quantize_squares if recipe == "squares" else fp8.quantize_rows
    return fp8.quantize_rows(a), second(b)


@pytest.mark.parametrize("shape", [(16, 32, 128), (5, 130, 300), (200, 48, 257)], ids=str)
@pytest.mark.parametrize("recipe", ["tensor", "rows", "squares"])
def test_a_product_is_the_exact_sum_to_float32(recipe: str, shape: tuple[int, int, int]) -> None:
    """Against float64 over the definition's values of the same bytes."""
    a, b = operands(recipe, *shape)
    factors = []
    for operand in (a, b):
        data = operand.data_RK.view(torch.uint8).numpy()
        table = float8.positive_values(operand.data_RK.dtype)
        values = table[data & 127] * np.where(data & 128, -1, 1)
        inverse = operand.inverse.double().numpy().reshape(operand.inverse.shape or (1, 1))
        step = operand.rows_per_block or WHOLE
        rows = np.arange(values.shape[0]) // step
        columns = np.arange(values.shape[1]) // (128 if operand.rows_per_block else WHOLE)
        factors.append(values * inverse[np.ix_(rows, columns)])
    exact = factors[0] @ factors[1].T
    bound = np.abs(factors[0]) @ np.abs(factors[1]).T * shape[2] * 2.0**-24
    product = fp8.scaled_mm(a, b, torch.float32)
    assert np.all(np.abs(product.double().numpy() - exact) <= bound)
    half = fp8.scaled_mm(a, b, torch.bfloat16)
    assert torch.equal(half, product.bfloat16())


@pytest.mark.parametrize("other", [E4M3, E5M2], ids=["e4m3", "e5m2"])
def test_per_tensor_products_are_torchs_own(other: torch.dtype) -> None:
    """torch._scaled_mm runs per-tensor scales on a CPU too."""
    generator = torch.Generator().manual_seed(3)
    a = fp8.quantize_tensor(torch.randn(48, 160, generator=generator), other)
    b = fp8.quantize_tensor(torch.randn(64, 160, generator=generator), E4M3)
    theirs = torch._scaled_mm(
        a.data_RK, b.data_RK.t(), a.inverse, b.inverse, out_dtype=torch.float32
    )
    ours = fp8.scaled_mm(a, b, torch.float32)
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-6


def test_an_empty_batch_gives_an_empty_product() -> None:
    empty = torch.empty(0, 256)
    weight = fp8.quantize_squares(torch.randn(48, 256))
    assert fp8.scaled_mm(fp8.quantize_rows(empty), weight, torch.bfloat16).shape == (0, 48)
    turned = fp8.scaled_mm(
        fp8.quantize_rows(torch.empty(0, 48).t()),
        fp8.quantize_rows(empty.t()),
        torch.bfloat16,
    )
    assert turned.shape == (48, 256)
    assert not turned.any()
    whole = fp8.quantize_tensor(empty, E4M3)
    assert fp8.scaled_mm(
        whole, fp8.quantize_tensor(torch.randn(48, 256), E4M3), torch.bfloat16
    ).shape == (0, 48)


@pytest.mark.parametrize("recipe", ["tensor", "rows", "squares"])
@pytest.mark.parametrize("shape", [(16, 128, 128), (30, 130, 300), (128, 256, 640)], ids=str)
def test_tensor_cores_are_asked_in_shapes_they_take(
    recipe: str, shape: tuple[int, int, int]
) -> None:
    """torch's own shape checks for CUDA run on meta tensors: multiples of 16, row- and
    column-major operands, sizes and strides of the scales."""
    rows, columns, depth = shape
    a, b = torch.empty(rows, depth, device="meta"), torch.empty(depth, columns, device="meta").t()
    if recipe == "tensor":
        pair = fp8.quantize_tensor(a, E5M2), fp8.quantize_tensor(b, E4M3)
    else:
        pair = (
            fp8.quantize_rows(a),
            fp8.quantize_squares(b) if recipe == "squares" else fp8.quantize_rows(b),
        )
    product = fp8.scaled_mm(*pair, torch.bfloat16)
    assert (product.device.type, tuple(product.shape)) == ("meta", (rows, columns))
    assert product.dtype is torch.bfloat16


def test_hardware_scales_hold_the_same_numbers() -> None:
    """What is filled up and turned for cuBLAS: 1s beside the scales, zeros beside the bytes."""
    quantized = fp8.quantize_rows(drawn((30, 300), "wide", torch.float32))
    scales = fp8._row_scales(quantized.inverse, 32)
    assert scales.stride() == (1, 32)
    assert torch.equal(scales[:30], quantized.inverse)
    assert bool((scales[30:] == 1).all())
    squares = fp8.quantize_squares(drawn((200, 700), "wide", torch.float32)).inverse
    turned = fp8._square_scales(squares)
    assert (tuple(turned.shape), turned.stride()) == ((8, 2), (1, 8))
    assert torch.equal(turned[:6], squares.t())
    data = fp8._padded(quantized.data_RK, 16, 128).view(torch.uint8)
    assert tuple(data.shape) == (32, 384)
    assert torch.equal(data[:30, :300], quantized.data_RK.view(torch.uint8))
    assert not data[30:].any()
    assert not data[:, 300:].any()


@pytest.mark.parametrize("kind", ["tensor", "squares"])
def test_compiled_as_on_cuda_the_bytes_are_the_same(kind: str) -> None:
    """One graph without breaks; traced here, not lowered, as that needs no compiler."""
    cast = fp8._cast_tensor if kind == "tensor" else fp8._cast_blocks
    option = None if kind == "tensor" else KINDS[kind][1][0]
    compiled = torch.compile(cast.__wrapped__, dynamic=True, fullgraph=True, backend="aot_eager")
    for x in (torch.randn(128, 384).bfloat16(), torch.randn(256, 128).t()):
        data, inverse = compiled(x, E4M3, option)
        expected, expected_inverse = cast(x, E4M3, option)
        assert torch.equal(data.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(inverse, expected_inverse)


def matrices() -> list[Tensor]:
    """What a run quantizes, by what a compiler tells apart: whole, ragged and square, turned,
    learning and not, one row, in bfloat16 and float32."""
    shapes = [(256, 512), (512, 512), (200, 300), (1, 512), (128, 128)]
    found = []
    for rows, columns in shapes:
        plain = torch.randn(rows, columns).bfloat16()
        learning = torch.randn(rows, columns).bfloat16().requires_grad_()
        turned = torch.randn(columns, rows).bfloat16().t()
        found += [plain, learning, turned, plain.float()]
    return found


@pytest.mark.parametrize("recipe", ["delayed", "blockwise"])
def test_a_run_compiles_no_more_than_the_compiler_allows(
    recipe: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond `MOST_COMPILED` it raises in the middle of a step."""
    if recipe == "blockwise":
        name, quantizers = "_cast_blocks", [fp8.quantize_rows, fp8.quantize_squares]
    else:
        quantize, amax = fp8.quantize_tensor, torch.tensor(3.0)
        name = "_cast_tensor"
        quantizers = [functools.partial(quantize, dtype=t, amax=amax) for t in (E4M3, E5M2)]
    plain, made = getattr(fp8, name), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        made.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(plain.__wrapped__, dynamic=True, fullgraph=True, backend=backend)
    for quantize in quantizers:
        for x in matrices():
            monkeypatch.setattr(fp8, name, plain)
            expected = quantize(x)
            monkeypatch.setattr(fp8, name, compiled)
            with torch._dynamo.config.patch(recompile_limit=fp8.MOST_COMPILED):
                found = quantize(x)
            assert torch.equal(found.data_RK.view(torch.uint8), expected.data_RK.view(torch.uint8))
            assert torch.equal(found.inverse, expected.inverse)
    assert 1 < len(made) < fp8.MOST_COMPILED


@pytest.mark.parametrize(
    ("capability", "cuda", "tensorwise", "blockwise"),
    [
        ((8, 0), "12.9", "8.9 or more", "8.9 or more"),
        ((8, 9), "12.9", None, "9.x"),
        ((9, 0), "12.9", None, None),
        ((9, 0), "13.0", None, None),
        ((9, 0), "12.6", None, "CUDA 12.9"),
        ((10, 0), "12.9", None, "9.x"),
    ],
)
def test_what_a_device_cannot_run_is_said(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cuda: str,
    tensorwise: str | None,
    blockwise: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    for asked, expected in ((False, tensorwise), (True, blockwise)):
        reason = fp8.why_unsupported(torch.device("cuda"), blockwise=asked)
        assert (reason is None) if expected is None else (reason is not None and expected in reason)
    assert fp8.why_unsupported(torch.device("cpu"), blockwise=True) is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", ["tensor", "rows", "squares"])
@pytest.mark.parametrize("shape", [(64, 128, 256), (30, 130, 300), (512, 648, 1280)], ids=str)
def test_on_cuda_bytes_are_equal_and_products_near(
    recipe: str, shape: tuple[int, int, int]
) -> None:
    """The tensor cores' accumulator is shorter than float32."""
    reason = fp8.why_unsupported(torch.device("cuda"), blockwise=recipe != "tensor")
    if reason is not None:
        pytest.skip(reason)
    rows, columns, depth = shape
    a, b = torch.randn(rows, depth).bfloat16(), torch.randn(depth, columns).bfloat16().t()
    first = fp8.quantize_tensor if recipe == "tensor" else fp8.quantize_rows
    second = {"tensor": first, "rows": first, "squares": fp8.quantize_squares}[recipe]
    here = first(a, E4M3), second(b, E4M3)
    there = first(a.cuda(), E4M3), second(b.cuda(), E4M3)
    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.data_RK.view(torch.uint8), other.data_RK.cpu().view(torch.uint8))
        assert torch.equal(one.inverse, other.inverse.cpu())
    expected = fp8.scaled_mm(*here, torch.float32)
    product = fp8.scaled_mm(*there, torch.float32).cpu()
    assert float((product - expected).norm() / expected.norm()) < 2e-3
