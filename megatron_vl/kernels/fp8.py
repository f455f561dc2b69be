"""FP8 matrix products: quantizers and `scaled_mm`, on tensor cores and, byte for byte, on a CPU.

A matrix is stored as float8 bytes and float32 inverse scales, `value = byte * inverse`. Three ways
to share a scale: the whole tensor, 1x128 blocks of a row (activations, gradients), 128x128 blocks
(weights). The last axis is always the contraction; blocks at its end may be ragged.

Scales are powers of two: the largest one that keeps the block's largest magnitude in range. So
scaling is exact and the cast to 8 bits is the only rounding, a value quantized along rows and along
columns is rounded to the same number (but for what is flushed to zero), and neighbours move a value
only when they change the exponent of the block's amax. It costs at most one binade of range at the
small end, no precision. Transformer Engine's block recipe does the same by default.

Rules for every quantizer: a magnitude below 2**-110, zero included, counts as 2**-110; an infinite
or NaN amax makes scale and bytes of the whole block NaN, so that a broken value ends in the loss
instead of in a saturated number; casts round to nearest, ties to even.

On CUDA `scaled_mm` is torch's: `torch._scaled_mm` for per-tensor scales,
`torch.nn.functional.scaled_mm` for blocks, with the padding and scale layouts cuBLAS asks for. On a
CPU the same bytes and scales are decoded and multiplied in float32. Cost on a CPU: a float32
product plus about ten element-wise passes.

Shapes: R, C rows of the two operands, K contraction, k blocks of K, r blocks of R.
"""

import functools
import importlib.util
import shutil
import struct
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

E4M3 = torch.float8_e4m3fn
E5M2 = torch.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
BLOCK = 128
# Keeps scales and their inverses normal float32 numbers in both formats.
SMALLEST_AMAX = 2.0**-110
_EXPONENT_BITS = 0x7F800000
_MANTISSA_BITS = 0x007FFFFF
_ONE_BITS = 0x3F800000
# LARGEST as float32.
_LARGEST_BITS = {
    kind: int.from_bytes(struct.pack(">f", largest), "big") for kind, largest in LARGEST.items()
}
# What cuBLAS wants of every dimension of an FP8 product.
ALIGNMENT = 16

MOST_COMPILED = 32
"""Kinds of matrices a quantizer is compiled for (types, layouts, lengths of one); the compiler
raises beyond, and by itself it does so beyond 8, which a run of the 12B has."""

P = ParamSpec("P")
Cast = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Quantized:
    """A matrix in FP8.

    Attributes:
        data_RK: float8 bytes.
        inverse: float32 inverse scales: () for the tensor, (R, k) for rows, (r, k) for squares.
        rows_per_block: rows that share a scale: 0 for all, 1 or 128.
    """

    data_RK: Tensor
    inverse: Tensor
    rows_per_block: int

    def transposed(self) -> "Quantized":
        """The same bytes with the other axis as contraction; not for 1x128 blocks."""
        assert self.rows_per_block != 1, "1x128 blocks run along one axis: quantize anew"
        inverse = self.inverse.t() if self.rows_per_block else self.inverse
        return Quantized(self.data_RK.t(), inverse, self.rows_per_block)

    def dequantized(self) -> Tensor:
        """The values, float32 (R, K). Exact: a power of two times 4 significant bits at most."""
        values_RK = decode(self.data_RK)
        if self.rows_per_block == 0:
            return values_RK * self.inverse
        rows, columns = values_RK.shape
        blocks = _blocked(_filled(values_RK, self.rows_per_block), self.rows_per_block)
        scaled = blocks * self.inverse[:, None, :, None]
        return scaled.flatten(2).flatten(0, 1)[:rows, :columns]


def decode(data: Tensor) -> Tensor:
    """Float8 bytes as float32, by shifting them into float16: 3 to 10 times torch's own speed on a
    CPU. A NaN byte of E4M3 reads 480; quantizers give none without a NaN scale beside it."""
    if data.dtype == E5M2:
        return (data.view(torch.uint8).to(torch.int16) << 8).view(torch.float16).float()
    bits = (data.view(torch.int8).to(torch.int16) << 7) & 0xBFFF - 0x10000
    return bits.view(torch.float16).float() * 256.0


@functools.cache
def _can_compile() -> bool:
    """Triton is there, and what it builds its launchers with: a C compiler, Python's headers."""
    compilers = ("cc", "gcc", "clang")
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    found = importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))
    return found and header.is_file()


def _fused_on_cuda(function: Callable[P, Cast]) -> Callable[P, Cast]:
    """Compile a chain of element-wise passes into one where that pays; the bytes are the same."""
    compiled = functools.cache(lambda: torch.compile(function, dynamic=True, fullgraph=True))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Cast:
        x_RK = args[0]
        assert isinstance(x_RK, Tensor)
        if x_RK.is_cuda and _can_compile():
            # Set for every call: the setting is a thread's own, and backward has its own threads.
            with torch._dynamo.config.patch(recompile_limit=MOST_COMPILED):
                return compiled()(*args, **kwargs)
        return function(*args, **kwargs)

    return call


def largest(x: Tensor) -> Tensor:
    """Largest magnitude as a float32 scalar; 0 of an empty tensor, NaN where there is a NaN."""
    if x.numel() == 0:
        return torch.zeros((), dtype=torch.float32, device=x.device)
    return x.abs().amax().float()


def power_of_two_scale(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of two that keeps `amax` in range of `dtype`; NaN where it is not finite.

    Args:
        amax: float32 magnitudes, any shape.
    """
    bits = amax.clamp(min=SMALLEST_AMAX).view(torch.int32)
    largest_bits = _LARGEST_BITS[dtype]
    # The exponent of LARGEST / amax, one less where amax has the larger mantissa. Integers, since
    # compiled code divides by multiplying with an approximate inverse.
    borrows = (bits & _MANTISSA_BITS) > (largest_bits & _MANTISSA_BITS)
    exponent = (largest_bits & _EXPONENT_BITS) - (bits & _EXPONENT_BITS) - (borrows.int() << 23)
    scale = (exponent + _ONE_BITS).view(torch.float32)
    return torch.where(amax.isfinite(), scale, torch.nan)


def quantize_tensor(x_RK: Tensor, dtype: torch.dtype, amax: Tensor | None = None) -> Quantized:
    """One scale for the whole matrix.

    Args:
        amax: float32 scalar the scale is made for, as delayed scaling gives it; values beyond its
            range saturate. The matrix's own when None (current scaling).
    """
    data_RK, inverse = _cast_tensor(x_RK.detach(), dtype, amax)
    return Quantized(data_RK, inverse, rows_per_block=0)


def quantize_rows(x_RK: Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    """One scale for each 128 neighbours of a row."""
    return _quantize_blocks(x_RK, dtype, 1)


def quantize_squares(x_RK: Tensor, dtype: torch.dtype = E4M3) -> Quantized:
    """One scale for each 128x128 block."""
    return _quantize_blocks(x_RK, dtype, BLOCK)


def _quantize_blocks(x_RK: Tensor, dtype: torch.dtype, rows_per_block: int) -> Quantized:
    rows, columns = x_RK.shape
    data_RK, inverse = _cast_blocks(_filled(x_RK.detach(), rows_per_block), dtype, rows_per_block)
    return Quantized(data_RK[:rows, :columns].contiguous(), inverse, rows_per_block)


@_fused_on_cuda
def _cast_tensor(x_RK: Tensor, dtype: torch.dtype, amax: Tensor | None) -> Cast:
    scale = power_of_two_scale(largest(x_RK) if amax is None else amax, dtype)
    scaled = x_RK.float() * scale
    if amax is not None:
        scaled = scaled.clamp(-LARGEST[dtype], LARGEST[dtype])
    return scaled.to(dtype).contiguous(), scale.reciprocal()


@_fused_on_cuda
def _cast_blocks(x_RK: Tensor, dtype: torch.dtype, rows_per_block: int) -> Cast:
    """Whole blocks alone."""
    blocks = _blocked(x_RK.contiguous().float(), rows_per_block)
    scale = power_of_two_scale(blocks.abs().amax((1, 3)), dtype)
    scaled = (blocks * scale[:, None, :, None]).flatten(2).flatten(0, 1)
    return scaled.to(dtype), scale.reciprocal()


def _filled(x_RK: Tensor, rows_per_block: int) -> Tensor:
    """Ragged ends filled with zeros."""
    rows, columns = x_RK.shape
    fill = (0, -columns % BLOCK, 0, -rows % rows_per_block)
    return F.pad(x_RK, fill) if any(fill) else x_RK


def _blocked(x_RK: Tensor, rows_per_block: int) -> Tensor:
    """(r, rows of a block, k, 128), of whole blocks."""
    rows, columns = x_RK.shape
    return x_RK.reshape(rows // rows_per_block, rows_per_block, columns // BLOCK, BLOCK)


def scaled_mm(a_RK: Quantized, b_CK: Quantized, out_dtype: torch.dtype) -> Tensor:
    """The product a b^T, (R, C), accumulated in float32.

    Both operands are scaled per tensor, or both in blocks, of which at most one in squares; not
    both are E5M2 (tensor cores have no such product).
    """
    assert E4M3 in (a_RK.data_RK.dtype, b_CK.data_RK.dtype)
    assert (a_RK.rows_per_block == 0) == (b_CK.rows_per_block == 0)
    assert a_RK.rows_per_block in (0, 1)
    if a_RK.data_RK.numel() == 0 or b_CK.data_RK.numel() == 0:
        shape = (a_RK.data_RK.shape[0], b_CK.data_RK.shape[0])
        return torch.zeros(shape, dtype=out_dtype, device=a_RK.data_RK.device)
    if a_RK.data_RK.device.type == "cpu":
        return (a_RK.dequantized() @ b_CK.dequantized().t()).to(out_dtype)
    product = _per_tensor_product if a_RK.rows_per_block == 0 else _block_product
    rows, columns = a_RK.data_RK.shape[0], b_CK.data_RK.shape[0]
    return product(a_RK, b_CK, out_dtype)[:rows, :columns]


def _per_tensor_product(a_RK: Quantized, b_CK: Quantized, out_dtype: torch.dtype) -> Tensor:
    return torch._scaled_mm(
        _padded(a_RK.data_RK, ALIGNMENT, ALIGNMENT),
        _padded(b_CK.data_RK, ALIGNMENT, ALIGNMENT).t(),
        scale_a=a_RK.inverse,
        scale_b=b_CK.inverse,
        out_dtype=out_dtype,
    )


def _block_product(a_RK: Quantized, b_CK: Quantized, out_dtype: torch.dtype) -> Tensor:
    """Whole blocks along the contraction, whole squares: ragged ones reach cuBLAS filled up."""
    square = b_CK.rows_per_block == BLOCK
    a_data = _padded(a_RK.data_RK, ALIGNMENT, BLOCK)
    b_data = _padded(b_CK.data_RK, BLOCK if square else ALIGNMENT, BLOCK)
    kinds = F.ScalingType
    return F.scaled_mm(
        a_data,
        b_data.t(),
        _row_scales(a_RK.inverse, a_data.shape[0]),
        kinds.BlockWise1x128,
        _square_scales(b_CK.inverse) if square else _row_scales(b_CK.inverse, b_data.shape[0]),
        kinds.BlockWise128x128 if square else kinds.BlockWise1x128,
        output_dtype=out_dtype,
    )


def _padded(data_RK: Tensor, row_multiple: int, column_multiple: int) -> Tensor:
    """Contiguous bytes, filled up with zeros."""
    rows, columns = data_RK.shape
    fill = (0, -columns % column_multiple, 0, -rows % row_multiple)
    if not any(fill):
        return data_RK.contiguous()
    return F.pad(data_RK.view(torch.uint8), fill).view(data_RK.dtype)


def _row_scales(inverse_Rk: Tensor, rows: int) -> Tensor:
    """(rows, k) with the rows next to each other in memory, 1 for rows that are filling."""
    filled = F.pad(inverse_Rk, (0, 0, 0, rows - inverse_Rk.shape[0]), value=1.0)
    return filled.t().contiguous().t()


def _square_scales(inverse_rk: Tensor) -> Tensor:
    """(k filled up to a multiple of 4, r) with the k next to each other in memory."""
    return F.pad(inverse_rk, (0, -inverse_rk.shape[1] % 4), value=1.0).contiguous().t()


def why_unsupported(device: torch.device, *, blockwise: bool) -> str | None:
    """Why this machine cannot run an FP8 recipe, or None. A CPU runs all of them, emulated."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    version = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    if capability < (8, 9):
        return f"it has compute capability {capability[0]}.{capability[1]}, FP8 needs 8.9 or more"
    if not blockwise:
        return None
    if capability[0] != 9:
        return (
            f"it has compute capability {capability[0]}.{capability[1]}, cuBLAS multiplies FP8 "
            "blocks on 9.x alone"
        )
    if not hasattr(F, "scaled_mm") or version < (12, 9):
        return (
            f"torch {torch.__version__} was built for CUDA {torch.version.cuda}; blocks need "
            "torch.nn.functional.scaled_mm (torch 2.10) and CUDA 12.9"
        )
    return None
