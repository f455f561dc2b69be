"""The FP8 linear: rounding within its bound, equal at every layout, history kept once a step."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vl.config.schema import ParallelConfig
from megatron_vl.engine.fp8_linear import Blockwise, Fp8Product, Operand, Tensorwise
from megatron_vl.kernels.fp8 import E4M3, E5M2
from tests.engine import fp8_jobs
from tests.engine.fp8_jobs import Passed, arithmetic_of, build, drawn, one_pass
from tests.support.one_rank import one_rank
from tests.support.ranks import RankPool

RECIPES = ["blockwise", "tensorwise", "delayed"]
ONE = ParallelConfig()
# Largest value, half a step relative to a value, half the smallest step.
ROUNDING = {E4M3: (448.0, 2.0**-4, 2.0**-10), E5M2: (57344.0, 2.0**-3, 2.0**-17)}


@pytest.fixture(scope="module")
def groups() -> Iterator[ProcessGroupCollection]:
    with one_rank() as made:
        yield made


def cast_error(x: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """The most a value may move: half a step, or half the smallest step at the block's scale,
    which is less than twice what brings the block's amax to the largest value."""
    largest, relative, smallest = ROUNDING[dtype]
    amax = torch.empty_like(x)
    for row in range(0, x.shape[0], block[0]):
        for column in range(0, x.shape[1], block[1]):
            here = slice(row, row + block[0]), slice(column, column + block[1])
            amax[here] = x[here].abs().max()
    return torch.maximum(x.abs() * relative, 2 * amax / largest * smallest)


def product_error(a: Tensor, a_error: Tensor, b: Tensor, b_error: Tensor) -> Tensor:
    """The most a product a b^T may move."""
    sums = a.shape[1] * 2.0**-23 * (a.abs() @ b.abs().t())
    return a_error @ b.abs().t() + a.abs() @ b_error.t() + a_error @ b_error.t() + sums


@pytest.mark.parametrize("recipe", RECIPES)
def test_three_products_stay_within_the_rounding_of_their_operands(
    groups: ProcessGroupCollection, recipe: str
) -> None:
    arithmetic, _ = arithmetic_of(recipe, groups)
    x = (drawn(1, 60, 200) * torch.linspace(1, 40, 60).unsqueeze(1)).requires_grad_()
    weight = (drawn(2, 150, 200) / 20).requires_grad_()
    bias = drawn(3, 150).requires_grad_()
    gradient = drawn(4, 60, 150) / 1e4
    output = Fp8Product.apply(
        x.unsqueeze(1), weight, bias, arithmetic, True, False, False, None
    ).squeeze(1)
    output.backward(gradient)
    whole, row, square = (10**9, 10**9), (1, 128), (128, 128)
    per_tensor = recipe != "blockwise"
    backward = E5M2 if per_tensor else E4M3

    def error(values: Tensor, dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
        return cast_error(values, dtype, whole if per_tensor else block)

    plain, w = x.detach(), weight.detach()
    x_t, g_t = plain.t(), gradient.t()
    cases = {
        "output": (output - bias, plain, error(plain, E4M3, row), w, error(w, E4M3, square)),
        "input gradient": (
            x.grad, gradient, error(gradient, backward, row), w.t(), error(w, E4M3, square).t(),
        ),
        "weight gradient": (
            weight.grad, g_t, error(g_t, backward, row), x_t, error(x_t, E4M3, row),
        ),
    }  # fmt: skip
    for name, (found, a, a_error, b, b_error) in cases.items():
        exact = (a.double() @ b.double().t()).float()
        moved = (found.detach() - exact).abs()
        assert bool((moved <= product_error(a, a_error, b, b_error)).all()), name
        relative = float(moved.norm() / exact.norm())
        assert 0.02 < relative < (0.09 if "gradient" in name and per_tensor else 0.05), name
    assert torch.equal(bias.grad, gradient.sum(0))


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def assert_near(one: Passed, other: Passed, bound: float) -> None:
    for name in ("output", "grad_input", "grad_weight", "grad_bias"):
        found, expected = getattr(one, name), getattr(other, name)
        assert distance(found, expected) < bound, name


@pytest.mark.distributed
@pytest.mark.parametrize("sequence", [False, True], ids=["TP2", "TP2+SP"])
def test_two_tensor_ranks_compute_what_one_does(ranks: RankPool, sequence: bool) -> None:
    """Blockwise, cut at whole blocks: the same bytes, so only sums differ. Delayed: the same from
    the second step on, when the ranks have agreed on their amax."""
    alone = ranks.run(1, fp8_jobs.passes, ONE)[0]
    two = ParallelConfig(tensor=2, sequence=sequence)
    for rank in ranks.run(2, fp8_jobs.passes, two):
        for kind in ("column", "row"):
            for number in (0, 1):
                assert_near(rank[kind, "blockwise"][number], alone[kind, "blockwise"][number], 1e-6)
            assert_near(rank[kind, "delayed"][1], alone[kind, "delayed"][1], 1e-6)
            # Each rank scales its own part of a tensor: near, but not the same.
            assert_near(rank[kind, "tensorwise"][0], alone[kind, "tensorwise"][0], 0.03)
            # What one recipe differs from another by is far above the bound.
            with pytest.raises(AssertionError):
                assert_near(alone[kind, "tensorwise"][0], alone[kind, "blockwise"][0], 1e-3)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("kind", ["column", "row"])
def test_without_an_arithmetic_it_is_the_plain_linear(
    groups: ProcessGroupCollection, kind: str, recipe: str
) -> None:
    linear = build(kind, ONE, groups)
    plain = one_pass(linear, kind, ONE, groups)
    x = drawn(3, fp8_jobs.TOKENS, fp8_jobs.INPUTS)
    x = x * torch.linspace(0.5, 20, fp8_jobs.TOKENS).unsqueeze(1)
    if kind == "column":
        x = torch.nn.functional.rms_norm(x, x.shape[-1:], linear.layer_norm_weight, 1e-5)
    expected = x @ linear.weight.t() + linear.bias
    assert distance(plain.output.squeeze(1), expected.detach()) < 1e-6
    linear.arithmetic, _ = arithmetic_of(recipe, groups)
    eighth = one_pass(linear, kind, ONE, groups)
    assert_near(eighth, plain, 0.1)
    with pytest.raises(AssertionError):
        assert_near(eighth, plain, 0.01)


def test_a_frozen_weight_passes_the_gradient_on(groups: ProcessGroupCollection) -> None:
    linear = build("column", ONE, groups)
    linear.arithmetic = Blockwise()
    learning = one_pass(linear, "column", ONE, groups)
    linear.weight.requires_grad_(False)
    x = drawn(3, fp8_jobs.TOKENS, 1, fp8_jobs.INPUTS)
    x = (x * torch.linspace(0.5, 20, fp8_jobs.TOKENS).view(-1, 1, 1)).requires_grad_()
    output, _ = linear(x)
    output.backward(drawn(4, fp8_jobs.TOKENS, 1, fp8_jobs.OUTPUTS) / 1000)
    assert torch.equal(x.grad, learning.grad_input)
    assert linear.weight.grad is None


@pytest.mark.parametrize("recipe", RECIPES)
def test_no_tokens_give_no_output_and_zero_gradients(
    groups: ProcessGroupCollection, recipe: str
) -> None:
    linear = build("row", ONE, groups)
    linear.arithmetic, _ = arithmetic_of(recipe, groups)
    x = torch.empty(0, 1, fp8_jobs.INPUTS, requires_grad=True)
    output, _ = linear(x)
    assert output.shape == (0, 1, fp8_jobs.OUTPUTS)
    output.sum().backward()
    assert x.grad.shape == x.shape
    assert not linear.weight.grad.any()


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_broken_input_is_not_hidden(
    groups: ProcessGroupCollection, recipe: str, value: float
) -> None:
    linear = build("row", ONE, groups)
    linear.arithmetic, history = arithmetic_of(recipe, groups)
    good = drawn(3, fp8_jobs.TOKENS, 1, fp8_jobs.INPUTS)
    linear(good)
    if history is not None:
        history.advance()
    good[7, 0, 9] = value
    output, _ = linear(good)
    assert bool(output[7].isnan().all())


def test_a_second_forward_pass_changes_nothing(groups: ProcessGroupCollection) -> None:
    """Activation recompute under delayed scaling: amax and bytes are those of one pass."""
    found = []
    for recompute in (False, True):
        linear = build("column", ONE, groups)
        linear.arithmetic, history = arithmetic_of("delayed", groups)
        for scale in (1.0, 3.0, 0.7):
            x = (scale * drawn(6, 32, 1, fp8_jobs.INPUTS)).requires_grad_()
            output, _ = checkpoint(linear, x, use_reentrant=False) if recompute else linear(x)
            output.square().mean().backward()
            history.advance()
        found.append((linear.weight.grad, x.grad, history.history_WI3))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_history_holds_the_largest_of_each_step(groups: ProcessGroupCollection) -> None:
    """Two micro-batches a step, a window of 4 steps, evaluation in between leaves no mark."""
    linear = build("row", ONE, groups)
    linear.arithmetic, history = arithmetic_of("delayed", groups)
    generator = torch.Generator().manual_seed(8)
    seen = []
    for step in range(6):
        sizes = []
        for _ in range(2):
            x = torch.randn(20, 1, fp8_jobs.INPUTS, generator=generator) * (step + 1)
            gradient = torch.randn(20, 1, fp8_jobs.OUTPUTS, generator=generator) / (step + 1)
            output, _ = linear(x.requires_grad_())
            output.backward(gradient)
            sizes.append((float(x.abs().max()), float(gradient.abs().max())))
        linear.eval()
        with torch.no_grad():
            linear(1000 * x)
        linear.train()
        inputs, gradients = zip(*sizes, strict=True)
        seen.insert(0, [max(inputs), float(linear.weight.abs().max()), max(gradients)])
        history.advance()
        expected = torch.tensor((seen + [[0.0] * 3] * 4)[:4])
        assert torch.equal(history.history_WI3[:, 0], expected)
        assert torch.equal(history.reference_I3[0], expected.amax(0))


def test_the_scale_of_a_step_is_made_by_the_steps_before(groups: ProcessGroupCollection) -> None:
    arithmetic, history = arithmetic_of("delayed", groups)
    small, large = torch.full((1, 1), 0.9), torch.full((1, 1), 100.0)
    assert float(arithmetic.along(Operand.input, small).inverse) == 2.0**-8
    history.advance()
    saturated = arithmetic.along(Operand.input, large)
    assert float(saturated.dequantized()) == 448 * 2.0**-8
    history.advance()
    assert float(arithmetic.along(Operand.input, large).dequantized()) == pytest.approx(
        100, rel=0.04
    )
    assert float(Tensorwise().along(Operand.input, small).inverse) == 2.0**-8
