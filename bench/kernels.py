"""Measure the project's SSD scan beside transformers' torch implementation of the same scan.

    python bench/kernels.py            # both sizes, one thread
    python bench/kernels.py --quick    # the laptop size only

Each measurement is a forward and a backward in float32 on the CPU, the two implementations taking
turns, the best of several. Memory is the growth of anonymous resident memory (RssAnon), sampled in
a fresh process per implementation, so that mapped files and the allocator's leftovers do not
count. The second table doubles the length: the ratio to the line above should stay near 2.
"""

import argparse
import multiprocessing
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_vl.kernels.ssd import mamba_chunk_scan_combined


@dataclass(frozen=True)
class Size:
    """Sizes of one scan."""

    name: str
    length: int
    heads: int
    head_dim: int
    groups: int
    state_dim: int
    chunk: int


LAPTOP = Size("laptop", 512, 8, 32, 2, 32, 64)
FULL = Size("12B layer", 1024, 128, 80, 8, 128, 128)


def _inputs(size: Size) -> list[Tensor]:
    torch.manual_seed(0)
    shared = (1, size.length, size.groups, size.state_dim)
    x = torch.randn(1, size.length, size.heads, size.head_dim)
    dt = torch.randn(1, size.length, size.heads)
    A = -torch.exp(2.7 * torch.rand(size.heads))
    tensors = [x, dt, A, torch.randn(shared), torch.randn(shared)]
    tensors += [torch.randn(size.heads), torch.randn(size.heads) - 4]
    return [tensor.requires_grad_() for tensor in tensors]


def _ours(
    size: Size, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    y = mamba_chunk_scan_combined(x, dt, A, B, C, size.chunk, D=D, dt_bias=bias, dt_softplus=True)
    assert isinstance(y, Tensor)
    return y


def _theirs(
    size: Size, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    y = mamba2_chunk_scan(x, dt, A, B, C, size.chunk, D=D, dt_bias=bias, dt_softplus=True)
    assert isinstance(y, Tensor)
    return y


IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"project": _ours, "transformers": _theirs}


def _step(name: str, size: Size, inputs: list[Tensor], grad: Tensor) -> float:
    """Seconds of one forward and backward."""
    start = time.perf_counter()
    torch.autograd.grad(IMPLEMENTATIONS[name](size, *inputs), inputs, grad)
    return time.perf_counter() - start


def _rss_anon() -> int:
    """Anonymous resident memory of this process in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def _peak_growth(name: str, size: Size) -> float:
    """MiB by which RssAnon grows at most during one step; run it in a fresh process."""
    torch.set_num_threads(1)
    small = Size("warm", 32, 2, 8, 1, 8, 16)
    _step(name, small, _inputs(small), torch.ones(1, 32, 2, 8))
    inputs, grad = _inputs(size), torch.randn(1, size.length, size.heads, size.head_dim)
    before, peak, done = _rss_anon(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _rss_anon())
            done.wait(0.0005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    _step(name, size, inputs, grad)
    done.set()
    sampler.join()
    return (max(peak, _rss_anon()) - before) / 1024


def _best(size: Size, rounds: int, names: list[str]) -> dict[str, float]:
    inputs, grad = _inputs(size), torch.randn(1, size.length, size.heads, size.head_dim)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            times[name].append(_step(name, size, inputs, grad))
    return {name: min(values) for name, values in times.items()}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the laptop size only, fewer rounds")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    parser.add_argument("--rounds", type=int, default=0, help="timed rounds (default 20, or 5)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print("SSD scan, forward and backward, float32, CPU")
    print(
        f"{'size':<11}{'project':>12}{'transformers':>14}{'ratio':>8}{'MiB':>8}{'MiB theirs':>12}"
    )
    names = list(IMPLEMENTATIONS)
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for size in [LAPTOP] if options.quick else [LAPTOP, FULL]:
            rounds = options.rounds or (20 if size is LAPTOP else 5)
            best = _best(size, rounds, names)
            ours, theirs = best["project"] * 1e3, best["transformers"] * 1e3
            peaks = [pool.apply(_peak_growth, (name, size)) for name in names]
            print(
                f"{size.name:<11}{ours:>9.2f} ms{theirs:>11.2f} ms{theirs / ours:>7.2f}x"
                f"{peaks[0]:>8.0f}{peaks[1]:>12.0f}",
                flush=True,
            )
        print("\nproject, laptop width, by length")
        print(f"{'length':<11}{'ms':>12}{'to previous':>14}{'MiB':>8}")
        previous = 0.0
        for doublings in range(3 if options.quick else 6):
            length = 1024 << doublings
            size = Size("long", length, 8, 32, 2, 32, 64)
            ours = _best(size, 12, ["project"])["project"] * 1e3
            ratio = f"{ours / previous:.2f}x" if previous else ""
            peak = pool.apply(_peak_growth, ("project", size))
            print(f"{length:<11}{ours:>12.2f}{ratio:>14}{peak:>8.0f}", flush=True)
            previous = ours


if __name__ == "__main__":
    main()
