"""Measure packed attention beside one attention under a mask over the whole pack.

    python bench/attention.py            # 32,768 tokens in 16 documents, one thread
    python bench/attention.py --quick    # 8,192 tokens in 4 documents

A forward and a backward in float32 on the CPU, each in a fresh process. Memory is the growth of
anonymous resident memory (RssAnon), sampled, over what the inputs and their gradients take. The
shard is what the second of two context ranks computes: queries of its chunks against keys of the
pack, under rectangular masks of bounded size.
"""

import argparse
import multiprocessing
import threading
import time
from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_vl.kernels.attention import attend_segments
from megatron_vl.sequence.shards import causal_segments, shard

HEADS, GROUPS, WIDTH = 4, 2, 32


def _boundaries(length: int, documents: int) -> list[int]:
    return [length // documents * number for number in range(documents + 1)]


def _packed(tensors: list[Tensor], boundaries: list[int]) -> Tensor:
    segments = causal_segments(boundaries, 1, 0, padding=False)
    return attend_segments(*tensors, boundaries, segments, causal=True, scale=None)


def _sharded(tensors: list[Tensor], boundaries: list[int]) -> Tensor:
    query, key, value = tensors
    places = torch.from_numpy(shard(boundaries, 2, 1))
    segments = causal_segments(boundaries, 2, 1, padding=False)
    return attend_segments(query[places], key, value, boundaries, segments, causal=True, scale=None)


def _masked(tensors: list[Tensor], boundaries: list[int]) -> Tensor:
    """PyTorch's attention under a block-diagonal causal mask of length x length."""
    query, key, value = (tensor.transpose(0, 1).unsqueeze(0) for tensor in tensors)
    length = boundaries[-1]
    mask = torch.zeros(length, length, dtype=torch.bool)
    for start, end in pairwise(boundaries):
        mask[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


WAYS: dict[str, Callable[[list[Tensor], list[int]], Tensor]] = {
    "packed": _packed,
    "shard of 2": _sharded,
    "full mask": _masked,
}


def _rss_anon() -> int:
    """Anonymous resident memory of this process in KiB."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon"))


def _measure(way: str, length: int, documents: int) -> tuple[float, float]:
    """Seconds, and MiB by which RssAnon grows at most; run it in a fresh process."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    tensors = [
        torch.randn(length, heads, WIDTH).requires_grad_() for heads in (HEADS, GROUPS, GROUPS)
    ]
    for tensor in tensors:
        tensor.grad = torch.ones_like(tensor)
    before, peak, done = _rss_anon(), 0, threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _rss_anon())
            done.wait(0.002)

    sampler = threading.Thread(target=sample)
    sampler.start()
    began = time.perf_counter()
    WAYS[way](tensors, _boundaries(length, documents)).sum().backward()
    seconds = time.perf_counter() - began
    done.set()
    sampler.join()
    return seconds, (max(peak, _rss_anon()) - before) / 1024


def main() -> None:
    """Print one line a way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the length")
    options = parser.parse_args()
    length, documents = (8192, 4) if options.quick else (32768, 16)
    print(
        f"Attention, {length} tokens in {documents} documents, {HEADS} heads of {WIDTH}, "
        f"{GROUPS} key/value heads, forward and backward, float32, CPU, one thread"
    )
    print(f"{'way':<12}{'s':>9}{'MiB':>9}{'of full mask':>14}")
    found = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for way in WAYS:
            found[way] = pool.apply(_measure, (way, length, documents))
    for way, (seconds, mebibytes) in found.items():
        share = mebibytes / found["full mask"][1]
        print(f"{way:<12}{seconds:>9.2f}{mebibytes:>9.0f}{share:>14.3f}", flush=True)


if __name__ == "__main__":
    main()
