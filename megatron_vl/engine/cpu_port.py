"""Stand-ins for the CUDA calls megatron-core makes, for machines without CUDA.

Two steps. `stand_in_for_cuda` runs before megatron-core is imported and gives `torch.cuda` the few
functions it calls, answering for the CPU. `patch_core` runs after and handles what is written as a
literal: `device="cuda"` in the optimizer and the pipeline schedules, and the RNG tracker's state.

The literals are handled by handing those modules a view of `torch` whose factories map "cuda" to
"cpu". Only the listed modules see it, so the hot path of the model pays nothing.
Two methods of `torch.Tensor` change for everyone: `type()` without arguments reports a CPU tensor
under its CUDA name, which the distributed optimizer compares against, and `cuda()` returns the
tensor as it is, which its checkpoint code calls.
"""

import contextlib
import functools
import importlib
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

# Modules of megatron-core 0.16 on the training path that name the device "cuda" literally.
MODULES_WITH_CUDA_LITERALS = (
    "megatron.core.utils",
    "megatron.core.optimizer.optimizer",
    "megatron.core.optimizer.clip_grads",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed.param_and_grad_buffer",
)
FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "zeros_like", "empty_like")
CPU = torch.device("cpu")


class _Idle:
    """A CUDA stream or event on a machine that has none: every call returns at once."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def wait_stream(self, stream: Any) -> None:
        pass

    def wait_event(self, event: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


def _idle_call() -> Callable[..., None]:
    """A function that does nothing; one for each name, as torch's compiler keys on identity."""

    def call(*args: Any, **kwargs: Any) -> None:
        return None

    return call


@contextlib.contextmanager
def _idle_stream(stream: Any) -> Iterator[None]:
    yield


IDLE_CALLS = ("synchronize", "empty_cache", "set_device")
IDLE_RANGE_CALLS = ("range_push", "range_pop")


def stand_in_for_cuda() -> None:
    """Give `torch.cuda` CPU answers for the calls megatron-core makes while training."""
    cuda: Any = torch.cuda
    for name in IDLE_CALLS:
        setattr(cuda, name, _idle_call())
    for name in IDLE_RANGE_CALLS:
        setattr(cuda.nvtx, name, _idle_call())
    cuda.current_device = lambda: CPU
    cuda.manual_seed = lambda seed: torch.manual_seed(seed)
    cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    cuda.Stream = _Idle
    cuda.Event = _Idle
    cuda.current_stream = lambda device=None: _Idle()
    cuda.default_stream = lambda device=None: _Idle()
    cuda.stream = _idle_stream
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    _report_cuda_type_names()


def _report_cuda_type_names() -> None:
    plain_type = torch.Tensor.type
    if getattr(plain_type, "reports_cuda_names", False):
        return

    @functools.wraps(plain_type)
    def type_with_cuda_name(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        name = plain_type(self, *args, **kwargs)
        if isinstance(name, str):
            return name.replace("torch.", "torch.cuda.", 1)
        return name

    type_with_cuda_name.reports_cuda_names = True  # type: ignore[attr-defined]
    torch.Tensor.type = type_with_cuda_name  # type: ignore[method-assign,assignment]


class TorchOnCpu(types.ModuleType):
    """`torch` as a module with "cuda" literals sees it: factories put their tensors on the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        for name in FACTORIES:
            setattr(self, name, self._on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        @functools.wraps(factory)
        def create(*args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("device") == "cuda":
                kwargs["device"] = CPU
            return factory(*args, **kwargs)

        return create


def patch_core() -> None:
    """Redirect the literals and the RNG tracker of an imported megatron-core to the CPU."""
    on_cpu = TorchOnCpu()
    for name in MODULES_WITH_CUDA_LITERALS:
        importlib.import_module(name).__dict__["torch"] = on_cpu

    random: Any = importlib.import_module("megatron.core.tensor_parallel.random")
    random._get_cuda_rng_state = lambda device=None, clone=False, graph_safe=False: (
        torch.get_rng_state()
    )
    random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(
        state
    )
    # On the CPU the tracked generator is the CPU's own, so the tracker's warning that it moved
    # inside a fork says only that it did its work.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
