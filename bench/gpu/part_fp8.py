"""The project's FP8 products beside bfloat16's and beside `torch._scaled_mm` alone.

At the 12B decoder's widths, 16,384 tokens. For each recipe: the time of quantizing both operands
and multiplying, beside a bfloat16 product; what of it is the product itself; and how far the
tensor cores' result lies from the same bytes multiplied in float32, which is what a CPU computes.
"""

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from bench.gpu.measure import Row, device, peak_tflops, relative, seconds
from megatron_vl.kernels.fp8 import (
    E4M3,
    Quantized,
    quantize_rows,
    quantize_squares,
    quantize_tensor,
    scaled_mm,
    why_unsupported,
)

Quantizer = Callable[[Tensor], Quantized]

RECIPES: dict[str, tuple[Quantizer, Quantizer]] = {
    "tensorwise": (lambda x: quantize_tensor(x, E4M3), lambda x: quantize_tensor(x, E4M3)),
    "blockwise": (quantize_rows, quantize_squares),
}
"""Quantizers of activations and of weights."""

WIDTHS = {"in_proj": (5120, 22656), "linear_fc1": (5120, 20480), "linear_fc2": (20480, 5120)}


def main(smoke: bool) -> None:
    """Measure every width and recipe."""
    tokens = 256 if smoke else 16384
    generator = torch.Generator().manual_seed(1)
    for name, (inner, outer) in WIDTHS.items():
        if smoke:
            inner, outer = inner // 40, outer // 40
        x = torch.randn(tokens, inner, generator=generator).to(device(), torch.bfloat16)
        weight = torch.randn(outer, inner, generator=generator).to(device(), torch.bfloat16) * 0.02
        work = 2 * tokens * inner * outer
        plain = seconds(lambda x=x, weight=weight: x @ weight.t())
        Row(
            "fp8",
            f"{name}, bf16 product",
            work / plain / 1e12,
            "TFLOP/s",
            _share(work, plain, "bf16"),
        ).say()
        for recipe, (of_rows, of_weights) in RECIPES.items():
            reason = why_unsupported(device(), blockwise=recipe == "blockwise")
            if reason:
                print(f"{recipe} is skipped: {reason}", file=sys.stderr)
                continue
            _recipe(f"{name}, {recipe}", x, weight, of_rows, of_weights, plain, work)


def _recipe(
    name: str, x: Tensor, weight: Tensor, of_rows: Quantizer, of_weights: Quantizer,
    plain: float, work: int,
) -> None:  # fmt: skip
    a, b = of_rows(x), of_weights(weight)
    alone = seconds(lambda: scaled_mm(a, b, torch.bfloat16))
    whole = seconds(lambda: scaled_mm(of_rows(x), of_weights(weight), torch.bfloat16))
    Row(
        "fp8", f"{name}, product alone", work / alone / 1e12, "TFLOP/s", _share(work, alone, "fp8")
    ).say()
    Row("fp8", f"{name}, with quantizing", plain / whole, "x", "times as fast as bf16").say()
    emulated = a.dequantized() @ b.dequantized().t()
    distance = relative(
        scaled_mm(a, b, torch.float32 if a.rows_per_block else torch.bfloat16), emulated
    )
    Row("fp8", f"{name}, from the same bytes in float32", distance, "relative").say()
    Row(
        "fp8",
        f"{name}, from bf16",
        relative(scaled_mm(a, b, torch.bfloat16), x @ weight.t()),
        "relative",
    ).say()


def _share(work: int, taken: float, precision: str) -> str:
    peak = peak_tflops(precision)
    return f"{work / taken / 1e12 / peak:.0%} of {peak:.0f} TFLOP/s {precision}" if peak else ""


if __name__ == "__main__":
    main("--smoke" in sys.argv)
