"""FP8 from its definition: every byte's value, and a quantizer that looks the nearest one up."""

import math

import numpy as np
import torch
from torch import Tensor

# Exponent bits, mantissa bits, exponent bias, largest finite byte.
FORMATS = {torch.float8_e4m3fn: (4, 3, 7, 0x7E), torch.float8_e5m2: (5, 2, 15, 0x7B)}


def positive_values(dtype: torch.dtype) -> np.ndarray:
    """The values of the bytes from 0 to the largest finite one, ascending."""
    _, mantissa_bits, bias, last = FORMATS[dtype]
    values = []
    for byte in range(last + 1):
        exponent, mantissa = divmod(byte, 1 << mantissa_bits)
        fraction = mantissa / (1 << mantissa_bits)
        subnormal = math.ldexp(fraction, 1 - bias)
        values.append(math.ldexp(1 + fraction, exponent - bias) if exponent else subnormal)
    return np.array(values)


def nearest_bytes(x: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """The byte whose value is nearest to each number; ties to even, too large saturates."""
    values = positive_values(dtype)
    above = np.clip(np.searchsorted(values, np.abs(x)), 1, len(values) - 1)
    low, high = np.abs(x) - values[above - 1], values[above] - np.abs(x)
    byte = np.where((low < high) | ((low == high) & (above % 2 == 1)), above - 1, above)
    return (byte + 128 * np.signbit(x)).astype(np.uint8)


def quantize(
    x: Tensor, dtype: torch.dtype, block: tuple[int, int], amax: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bytes and inverse scales of a matrix, block by block."""
    numbers = x.double().numpy()
    rows, columns = (-(-size // step) for size, step in zip(x.shape, block, strict=True))
    data, inverse = np.zeros(x.shape, np.uint8), np.zeros((rows, columns))
    for r in range(rows):
        for c in range(columns):
            here = np.s_[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            largest = np.abs(numbers[here]).max() if amax is None else amax
            room = positive_values(dtype)[-1] / max(largest, 2.0**-110)
            scale = 2.0 ** (math.frexp(room)[1] - 1)
            data[here] = nearest_bytes(numbers[here] * scale, dtype)
            inverse[r, c] = 1 / scale
    return data, inverse
