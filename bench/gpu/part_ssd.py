"""The torch SSD scan beside mamba_ssm's Triton scan, and packed beside separate documents.

At the 12B layer's shape, 16,384 tokens in eight documents of unequal length, bfloat16, forward and
backward. Packed and separate differ by rounding with the torch scan, by more with Triton's, whose
chunk sums cross documents; both distances are printed.
"""

import sys

import torch
from torch import Tensor

from bench.gpu.measure import Row, device, on_cuda, peak_gib, relative, reset_peak, seconds
from megatron_vl.kernels.ssd import mamba_chunk_scan_combined

HEADS, HEAD_DIM, GROUPS, STATE, CHUNK = 128, 80, 8, 128, 128
SHARES = (1, 9, 2, 5, 3, 7, 4, 1)
"""Lengths of the documents, in 32nds of the pack."""


def inputs(length: int, heads: int, dtype: torch.dtype) -> list[Tensor]:
    """x, dt, A, B, C, D and the bias of dt."""
    generator = torch.Generator().manual_seed(0)
    groups = max(1, GROUPS * heads // HEADS)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device(), dtype)

    x, dt = normal(1, length, heads, HEAD_DIM), normal(1, length, heads)
    A = -torch.exp(2.7 * torch.rand(heads, generator=generator)).to(device())
    B, C = normal(1, length, groups, STATE), normal(1, length, groups, STATE)
    D, bias = normal(heads).float(), normal(heads).float() - 4
    return [tensor.requires_grad_() for tensor in (x, dt, A, B, C, D, bias)]


def scan(scan_function, tensors: list[Tensor], documents_BL: Tensor | None) -> Tensor:
    """One forward pass."""
    x, dt, A, B, C, D, bias = tensors
    return scan_function(
        x, dt, A, B, C, CHUNK, D=D, dt_bias=bias, dt_softplus=True, seq_idx=documents_BL
    )


def apart(scan_function, tensors: list[Tensor], lengths: list[int]) -> Tensor:
    """Each document alone, joined."""
    x, dt, A, B, C, D, bias = tensors
    pieces = zip(*(t.split(lengths, dim=1) for t in (x, dt, B, C)), strict=True)
    return torch.cat(
        [scan(scan_function, [x, dt, A, B, C, D, bias], None) for x, dt, B, C in pieces], dim=1
    )


def main(smoke: bool) -> None:
    """Measure both scans where both are."""
    length, heads = (512, 4) if smoke else (16384, HEADS)
    tensors = inputs(length, heads, torch.bfloat16)
    gradient = torch.randn_like(tensors[0])
    lengths = [share * length // sum(SHARES) for share in SHARES]
    ids = torch.arange(len(lengths), dtype=torch.int32)
    documents_BL = ids.repeat_interleave(torch.tensor(lengths)).unsqueeze(0).to(device())
    scans = {"torch": mamba_chunk_scan_combined}
    if on_cuda():
        try:
            from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as triton_scan

            scans["mamba_ssm"] = triton_scan
        except ImportError as error:
            print(f"mamba_ssm is not here: {error}", file=sys.stderr)
    outputs, times = {}, {}
    for name, function in scans.items():

        def step(function=function) -> None:
            torch.autograd.grad(scan(function, tensors, documents_BL), tensors, gradient)

        reset_peak()
        times[name] = seconds(step)
        Row("ssd", f"{name}, packed, forward + backward", times[name] * 1e3, "ms").say()
        Row("ssd", f"{name}, peak memory", peak_gib(), "GiB").say()
        outputs[name] = scan(function, tensors, documents_BL).detach()
        distance = relative(outputs[name], apart(function, tensors, lengths).detach())
        Row("ssd", f"{name}, packed from separate documents", distance, "relative").say()
    if "mamba_ssm" in times:
        ratio = times["torch"] / times["mamba_ssm"]
        Row("ssd", "torch over mamba_ssm, time", ratio, "x").say()
        distance = relative(outputs["torch"], outputs["mamba_ssm"])
        Row("ssd", "torch from mamba_ssm", distance, "relative").say()


if __name__ == "__main__":
    main("--smoke" in sys.argv)
