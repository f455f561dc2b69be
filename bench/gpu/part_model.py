"""Training steps of the 12B widths with one layer of each kind and more, on one GPU.

Packs of 16,384 and 49,152 tokens (stages 1 and 2) with tiles, whole images, a pruned video and
text; bfloat16 and FP8. Figures: seconds a step, tokens a second, model FLOP utilisation (of actual
tiles, documents and layers; recomputation apart), peak memory.
"""

import gc
import sys
import time

import torch

from bench.gpu.measure import Row, device, drain, peak_gib, peak_tflops, reset_peak
from bench.gpu.model import drawn_trainee, groups_of, stage, world
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.flops import pack_flops
from megatron_vl.cost.recompute import recomputed_layers
from megatron_vl.data.pack import Pack
from megatron_vl.kernels.fp8 import why_unsupported
from megatron_vl.train.step import count, train_step
from megatron_vl.train.synthetic import synthetic_packs

CASES = (
    ("bf16", 16384),
    ("fp8_blockwise", 16384),
    ("fp8_tensorwise", 16384),
    ("bf16", 49152),
    ("fp8_blockwise", 49152),
)
LONG = 32768
"""Packs at least this long recompute their layers."""
TIMED_STEPS, WARM_STEPS = 3, 2


def main(smoke: bool) -> None:
    """Measure every case the device can run."""
    with world():
        for precision, length in CASES:
            tokens = length // 32 if smoke else length
            reason = why_unsupported(device(), blockwise=precision == "fp8_blockwise")
            if precision != "bf16" and reason:
                print(f"{precision} is skipped: {reason}", file=sys.stderr)
                continue
            overrides = [f"precision={precision}", f"data.sequence_length={tokens}"]
            config = stage(smoke, *overrides, recompute=length >= LONG)
            _case(config, f"{precision}, {tokens} tokens")


def _case(config: StageConfig, name: str) -> None:
    reset_peak()
    with groups_of(config) as groups:
        trainee = drawn_trainee(config, groups)
        times = []
        for step in range(WARM_STEPS + TIMED_STEPS):
            packs = synthetic_packs(config, 0)
            counts = count(packs, trainee)
            drain()
            began = time.perf_counter()
            result = train_step(packs, counts, trainee, config, config.optimizer.lr)
            drain()
            if step >= WARM_STEPS:
                times.append(time.perf_counter() - began)
        flops = _flops(config, packs[0])
        seconds = sorted(times)[len(times) // 2]
        peak = peak_tflops("bf16" if config.precision.value == "bf16" else "fp8")
        layers = config.model.decoder.pattern
        Row("model", f"{name}, {layers}, step", seconds, "s", f"loss {result.loss:.3f}").say()
        Row("model", f"{name}, tokens", counts.tokens / seconds, "tokens/s").say()
        Row("model", f"{name}, peak memory", peak_gib(), "GiB").say()
        share = ""
        if peak:
            mfu, hfu = (part / seconds / 1e12 / peak for part in flops)
            share = f"MFU {mfu:.1%}, HFU {hfu:.1%} of {peak:.0f}"
        Row("model", f"{name}, model FLOPs", flops[0] / seconds / 1e12, "TFLOP/s", share).say()
    del trainee
    gc.collect()
    torch.cuda.empty_cache()


def _flops(config: StageConfig, pack: Pack) -> tuple[float, float]:
    """Model FLOPs and hardware FLOPs of a step on one pack."""
    counted = pack_flops(
        config.model,
        document_lengths=pack.cu_seqlens.diff().tolist(),
        padded_length=pack.tokens_L.shape[0],
        grids=pack.grids,
        trainable={part.value for part in config.train.trainable},
        recomputed=recomputed_layers(config.model, config.parallel, config.recompute),
    )
    return counted.total, counted.hardware


if __name__ == "__main__":
    main("--smoke" in sys.argv)
