"""The project's own FP8 linear: forward, input gradient and weight gradient as FP8 products.

Twins of the torch spec's parallel linears, with the same parameters under the same names: they
multiply in BF16 until `engine.fp8_state` gives them an arithmetic. What is quantized, and how:

| recipe    | input X         | weight W         | gradient dY     | for dW: X and dY      |
|-----------|-----------------|------------------|-----------------|-----------------------|
| blockwise | E4M3, 1x128     | E4M3, 128x128    | E4M3, 1x128     | anew, 1x128 of tokens |
| tensorwise| E4M3, per tensor| E4M3, per tensor | E5M2, per tensor| the same bytes        |
| delayed   | as tensorwise, scaled by the largest amax of the last steps                     |

Blockwise in E4M3 alone is what the published training scripts use: a block of 128 needs less range
than a tensor does. E4M3 forward and E5M2 backward is megatron-core's `hybrid` format. In blockwise
FP8 a block of X or of W never holds numbers of two tokens, so in the forward pass no document
moves another; one scale for a whole tensor lets documents that raise its amax move their
neighbours. Weight gradients sum over tokens in any case.

Products leave in the type of the input (BF16); biases are added there. Under tensor parallelism
each rank scales the part of a matrix it holds; under sequence parallelism the gathered input is
quantized, which is what one rank would quantize. The input is kept for the backward pass as it came
(BF16, the rank's part of the sequence) and quantized a second time there: memory as in BF16.

Refuses nothing; `config.check_fp8` and `engine.fp8_state` refuse what cannot run.

Shapes: T tokens (sequence times batch), K input channels, N output channels, on this rank.
"""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import torch
import torch.distributed
from megatron.core.tensor_parallel.layers import RowParallelLinear
from torch import Tensor

from megatron_vl.engine.torch_layers import LayerNormColumnParallelLinear
from megatron_vl.kernels import fp8
from megatron_vl.kernels.fp8 import E4M3, E5M2, Quantized, scaled_mm


class Operand(IntEnum):
    """What a matrix is in a linear's three products; the column of its amax."""

    input = 0
    weight = 1
    gradient = 2


class Blockwise:
    """Quantizes in blocks: 1x128 of inputs and gradients, 128x128 of weights, all E4M3."""

    def along(self, operand: Operand, x_RK: Tensor, *, record: bool = True) -> Quantized:
        """Quantize with the last axis as contraction.

        Args:
            record: the amax counts for the steps to come (delayed scaling alone keeps it).
        """
        if operand is Operand.weight:
            return fp8.quantize_squares(x_RK)
        return fp8.quantize_rows(x_RK)

    def across(self, operand: Operand, x_KR: Tensor, along: Quantized | None = None) -> Quantized:
        """Quantize with the first axis as contraction.

        Args:
            along: the same matrix quantized along its last axis, where that is at hand.
        """
        if operand is Operand.weight:
            return fp8.quantize_squares(x_KR).transposed()
        return fp8.quantize_rows(x_KR.t())


class Tensorwise:
    """Quantizes with one scale a matrix, made for its own amax."""

    def along(self, operand: Operand, x_RK: Tensor, *, record: bool = True) -> Quantized:
        """See `Blockwise.along`."""
        return fp8.quantize_tensor(x_RK, _per_tensor_format(operand))

    def across(self, operand: Operand, x_KR: Tensor, along: Quantized | None = None) -> Quantized:
        """See `Blockwise.across`."""
        return (self.along(operand, x_KR) if along is None else along).transposed()


class Delayed(Tensorwise):
    """Quantizes with one scale a matrix, made for the largest amax of the last steps.

    Where a matrix has no history yet, its own amax serves. A broken value (infinite, NaN) breaks
    the result, as with the other recipes, though it could have been saturated.

    Args:
        reference_3: float32, the largest amax of the last steps by operand, 0 for none; read.
        current_3: float32, the largest amax of this step so far; raised. Seeing a matrix twice,
            as activation recompute does, changes nothing.
    """

    def __init__(self, reference_3: Tensor, current_3: Tensor) -> None:
        self.reference_3 = reference_3
        self.current_3 = current_3

    def along(self, operand: Operand, x_RK: Tensor, *, record: bool = True) -> Quantized:
        """See `Blockwise.along`."""
        own = fp8.largest(x_RK)
        if record:
            self.current_3[operand] = torch.maximum(self.current_3[operand], own)
        reference = self.reference_3[operand]
        amax = torch.where(reference > 0, reference, own)
        amax = torch.where(own.isfinite(), amax, torch.nan)
        return fp8.quantize_tensor(x_RK, _per_tensor_format(operand), amax)


Arithmetic = Blockwise | Tensorwise


def _per_tensor_format(operand: Operand) -> torch.dtype:
    return E5M2 if operand is Operand.gradient else E4M3


class Fp8Product(torch.autograd.Function):
    """Y = X W^T + b in FP8, with the collectives of tensor and sequence parallelism.

    The order of work and collectives follows megatron-core's
    `linear_with_grad_accumulation_and_async_allreduce`: in the backward pass the gather of X hides
    behind the input gradient, the reduction of the input gradient behind the weight gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        input_: Tensor,
        weight_NK: Tensor,
        bias_N: Tensor | None,
        arithmetic: Arithmetic,
        record: bool,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        group: torch.distributed.ProcessGroup | None,
    ) -> Tensor:
        """Multiply.

        Args:
            input_: (sequence, batch, K); this rank's part of the sequence if `sequence_parallel`.
            record: see `Blockwise.along`.
            allreduce_dgrad: sum the input gradient over `group`.

        Returns:
            (sequence, batch, N), the whole sequence.
        """
        ctx.save_for_backward(input_ if weight_NK.requires_grad else None, weight_NK)
        ctx.arithmetic, ctx.group = arithmetic, group
        ctx.allreduce_dgrad, ctx.sequence_parallel = allreduce_dgrad, sequence_parallel
        whole = _gather(input_, group).wait() if sequence_parallel else input_
        output_TN = scaled_mm(
            arithmetic.along(Operand.input, whole.flatten(0, -2), record=record),
            arithmetic.along(Operand.weight, weight_NK, record=record),
            input_.dtype,
        )
        if bias_N is not None:
            output_TN = output_TN + bias_N
        return output_TN.unflatten(0, whole.shape[:-1])

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of input, weight and bias."""
        input_, weight_NK = ctx.saved_tensors
        wants_input, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        arithmetic, group = ctx.arithmetic, ctx.group
        gathered = _gather(input_, group) if wants_weight and ctx.sequence_parallel else None
        gradient_TN = grad_output.flatten(0, -2)
        quantized_TN = arithmetic.along(Operand.gradient, gradient_TN)
        reduced = None
        if wants_input:
            grad_TK = scaled_mm(
                quantized_TN, arithmetic.across(Operand.weight, weight_NK), grad_output.dtype
            )
            grad_input = grad_TK.unflatten(0, grad_output.shape[:-1])
            reduced = _Pending(grad_input)
            if ctx.sequence_parallel:
                reduced = _reduce_scatter(grad_input, group)
            elif ctx.allreduce_dgrad:
                reduced = _all_reduce(grad_input, group)
        grad_weight = None
        if wants_weight:
            whole = gathered.wait() if gathered is not None else input_
            grad_weight = scaled_mm(
                arithmetic.across(Operand.gradient, gradient_TN, quantized_TN),
                arithmetic.across(Operand.input, whole.flatten(0, -2)),
                weight_NK.dtype,
            )
        grad_bias = gradient_TN.sum(dim=0) if wants_bias else None
        grad_input = reduced.wait() if reduced is not None else None
        return grad_input, grad_weight, grad_bias, None, None, None, None, None


class _Pending:
    """A tensor that is complete once its collective is."""

    def __init__(self, tensor: Tensor, work: Any = None) -> None:
        self._tensor, self._work = tensor, work

    def wait(self) -> Tensor:
        """Wait for the collective; gives the tensor."""
        if self._work is not None:
            self._work.wait()
        return self._tensor


def _gather(part: Tensor, group: torch.distributed.ProcessGroup | None) -> _Pending:
    assert group is not None
    whole = part.new_empty((part.shape[0] * group.size(), *part.shape[1:]))
    gather = torch.distributed.all_gather_into_tensor
    return _Pending(whole, gather(whole, part.contiguous(), group=group, async_op=True))


def _all_reduce(sums: Tensor, group: torch.distributed.ProcessGroup) -> _Pending:
    return _Pending(sums, torch.distributed.all_reduce(sums, group=group, async_op=True))


def _reduce_scatter(sums: Tensor, group: torch.distributed.ProcessGroup) -> _Pending:
    part = sums.new_empty((sums.shape[0] // group.size(), *sums.shape[1:]))
    scatter = torch.distributed.reduce_scatter_tensor
    return _Pending(part, scatter(part, sums, group=group, async_op=True))


class Probe:
    """What the drift meter measures at one linear, in the first pass it sees after it is set.

    Attributes:
        seen: a pass was measured; the passes after it are not.
        sums: squared error of the output against BF16, squared BF16 output, input values that are
            not zero and become zero in FP8, input values that are not zero; float64.
        peaks: amax of input and weight.
    """

    def __init__(self, device: torch.device) -> None:
        self.seen = False
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)
        self.peaks = torch.zeros(2, device=device)

    def look_at_operands(self, arithmetic: Arithmetic, x_TK: Tensor, weight_NK: Tensor) -> None:
        """Measure the input as it is quantized, and the weight."""
        data_TK = arithmetic.along(Operand.input, x_TK, record=False).data_RK
        nonzero_TK = x_TK != 0
        flushed_TK = (data_TK.view(torch.uint8) & 0x7F == 0) & nonzero_TK
        self.sums[2] = flushed_TK.sum()
        self.sums[3] = nonzero_TK.sum()
        self.peaks[0] = fp8.largest(x_TK)
        self.peaks[1] = fp8.largest(weight_NK)

    def compare(self, output: Tensor, shadow: Tensor) -> None:
        """Measure the output against its BF16 shadow."""
        self.sums[0] = (output.double() - shadow.double()).square().sum()
        self.sums[1] = shadow.double().square().sum()
        self.seen = True


class Fp8Capable(torch.nn.Module):
    """Mixed in before a parallel linear: multiplies in FP8 once it has an arithmetic.

    Attributes:
        weight: the layer's own, (N, K).
        arithmetic: how to quantize; None multiplies in the parameters' own type.
        probe: set by the drift meter; the next pass is then run a second time in BF16, with all its
            collectives.
        operands: what becomes of input and weight before anything else is done with them; None
            leaves them. The input is this rank's, before it is gathered.
    """

    weight: Tensor
    arithmetic: Arithmetic | None = None
    probe: Probe | None = None
    operands: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None
    _shadowed: Arithmetic | None = None

    def forward(self, input_: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the layer's own."""
        output, bias = super().forward(input_, *args, **kwargs)
        probe = self.probe
        if probe is not None and not probe.seen and self.arithmetic is not None and input_.numel():
            self._shadowed, self.arithmetic = self.arithmetic, None
            try:
                with torch.no_grad():
                    shadow, _ = super().forward(input_, *args, **kwargs)
            finally:
                self._shadowed, self.arithmetic = None, self._shadowed
            probe.compare(output.detach(), shadow)
        return output, bias

    def _forward_impl(
        self,
        input: Tensor,
        weight: Tensor,
        *,
        bias: Tensor | None,
        allreduce_dgrad: bool,
        sequence_parallel: bool,
        tp_group: torch.distributed.ProcessGroup | None,
        **kwargs: Any,
    ) -> Tensor:
        """megatron-core's hook for the product itself."""
        if self.operands is not None:
            input, weight = self.operands(input, weight)
        if self._shadowed is not None:
            assert self.probe is not None
            whole = _gather(input, tp_group).wait() if sequence_parallel else input
            self.probe.look_at_operands(self._shadowed, whole.flatten(0, -2), weight)
        if self.arithmetic is None and not (torch.is_grad_enabled() or sequence_parallel):
            # megatron-core's product without its autograd function, a sixth of a small decode step.
            output = torch.matmul(input, weight.t())
            return output if bias is None else output + bias
        if self.arithmetic is None:
            return super()._forward_impl(  # type: ignore[misc]
                input,
                weight,
                bias=bias,
                allreduce_dgrad=allreduce_dgrad,
                sequence_parallel=sequence_parallel,
                tp_group=tp_group,
                **kwargs,
            )
        return Fp8Product.apply(
            input,
            weight,
            bias,
            self.arithmetic,
            self.training,
            allreduce_dgrad,
            sequence_parallel,
            tp_group,
        )


class Fp8LayerNormColumnParallelLinear(Fp8Capable, LayerNormColumnParallelLinear):
    """The torch spec's norm and column-parallel linear."""


class Fp8RowParallelLinear(Fp8Capable, RowParallelLinear):
    """megatron-core's row-parallel linear."""
