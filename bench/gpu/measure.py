"""Time, memory and names of a device, the same on CUDA and (for a trial of the bench) on a CPU."""

import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

PEAK_TFLOPS = {
    "H200": {"bf16": 989.4, "fp8": 1978.9},
    "H100": {"bf16": 989.4, "fp8": 1978.9},
    "A100": {"bf16": 311.9},
    "B200": {"bf16": 2250.0, "fp8": 4500.0},
}
"""Dense peaks of NVIDIA's data sheets (SXM), by a word of the device's name."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    part: which bench. what: what was measured. value, unit: the figure. beside: what it stands
    beside, with its figure, or nothing.
    """

    part: str
    what: str
    value: float
    unit: str
    beside: str = ""

    def say(self) -> None:
        """Print it for the parent process, which collects the lines that begin so."""
        print("ROW " + json.dumps(asdict(self)), flush=True)


def on_cuda() -> bool:
    """Whether there is a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """Where the bench runs."""
    return torch.device("cuda" if on_cuda() else "cpu")


def device_name() -> str:
    """The device in words."""
    return torch.cuda.get_device_name() if on_cuda() else f"CPU {platform.machine()}"


def peak_tflops(precision: str) -> float | None:
    """The device's declared peak for bf16 or fp8; None where the table has none."""
    for word, peaks in PEAK_TFLOPS.items():
        if word in device_name():
            return peaks.get(precision)
    return None


def seconds(work: Callable[[], object], *, rounds: int = 5, warm: int = 2) -> float:
    """Median seconds of a call, the device's queue drained before and after each."""
    times = []
    for number in range(warm + rounds):
        drain()
        began = time.perf_counter()
        work()
        drain()
        if number >= warm:
            times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


def drain() -> None:
    """Wait for the device."""
    if on_cuda():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Start counting device memory anew."""
    if on_cuda():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """Most device memory allocated since `reset_peak`; 0 on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if on_cuda() else 0.0


def relative(one: torch.Tensor, other: torch.Tensor) -> float:
    """Relative L2 distance, in float64."""
    return float((one.double() - other.double()).norm() / other.double().norm())
