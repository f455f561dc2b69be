"""Stand-ins for packages megatron-core imports by name and this machine does not have.

megatron-core's Mamba mixer binds `mamba_ssm` functions when it is imported, and imports Triton for
inference kernels that training never calls. While it is imported, missing packages are present as
stand-in modules: the project's own kernels under the names megatron-core looks for, and a Triton
whose decorators keep the function and whose kernels refuse to run. Afterwards the stand-ins are
taken out of `sys.modules`, so that other libraries (transformers asks for the same packages) see
the machine as it is.

For the same time `torch.compile` hands functions back as they are on a machine without CUDA:
megatron-core compiles its small fusions when it is imported, which there would cost every process
seconds and a C++ compiler, for functions that the torch layer spec hardly calls.
"""

import contextlib
import importlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from megatron_vl.engine.platform import Platform

CORE_MODULES = (
    "megatron.core",
    "megatron.core.models.mamba.mamba_model",
    "megatron.core.transformer.transformer_block",
    "megatron.core.optimizer",
    "megatron.core.pipeline_parallel.schedules",
    "megatron.core.distributed",
    "megatron.core.dist_checkpointing",
)
# Names the missing packages without a fallback; the modules above fall back by themselves.
MODULE_THAT_INSISTS = "megatron.core.ssm.mamba_mixer"


class _AbsentKernel:
    """A Triton kernel on a machine without Triton: it can be named, never launched."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getitem__(self, grid: Any) -> Any:
        raise RuntimeError(f"kernel {self._name} needs Triton, which this machine does not have")


def _triton() -> dict[str, types.ModuleType]:
    def jit(function: Any = None, **options: Any) -> Any:
        if function is None:
            return jit
        return _AbsentKernel(function.__name__)

    language = _module("triton.language")
    language.constexpr = object  # type: ignore[attr-defined]
    triton = _module("triton")
    triton.jit = jit  # type: ignore[attr-defined]
    triton.language = language  # type: ignore[attr-defined]
    triton.cdiv = lambda a, b: -(-a // b)  # type: ignore[attr-defined]
    return {"triton": triton, "triton.language": language}


def _mamba_ssm() -> dict[str, types.ModuleType]:
    from megatron_vl.kernels import decode, gated_norm, ssd

    modules = {
        name: _module(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")
    }
    norm = _module("mamba_ssm.ops.triton.layernorm_gated")
    norm.RMSNorm = gated_norm.RMSNorm  # type: ignore[attr-defined]
    scan: Any = _module("mamba_ssm.ops.triton.ssd_combined")
    scan.mamba_chunk_scan_combined = ssd.mamba_chunk_scan_combined
    scan.mamba_split_conv1d_scan_combined = ssd.mamba_split_conv1d_scan_combined
    update: Any = _module("mamba_ssm.ops.triton.selective_state_update")
    update.selective_state_update = decode.selective_state_update
    return modules | {part.__name__: part for part in (norm, scan, update)}


def _causal_conv1d() -> dict[str, types.ModuleType]:
    from megatron_vl.kernels import conv1d

    package: Any = _module("causal_conv1d")
    package.causal_conv1d_fn = conv1d.causal_conv1d_fn
    package.causal_conv1d_update = conv1d.causal_conv1d_update
    ends: Any = _module("causal_conv1d.causal_conv1d_varlen")
    # Named by megatron-core's dynamic batching, which nothing here starts.
    ends.causal_conv1d_varlen_states = _AbsentKernel("causal_conv1d_varlen_states")
    return {part.__name__: part for part in (package, ends)}


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None)
    module.__path__ = []
    return module


@contextlib.contextmanager
def stand_ins(platform: Platform) -> Iterator[None]:
    """Have modules for the packages `platform` lacks in `sys.modules` while the block runs."""
    absent: dict[str, types.ModuleType] = {}
    if not platform.has_triton:
        absent |= _triton()
    if not platform.has_mamba_ssm:
        absent |= _mamba_ssm()
    if not platform.has_causal_conv1d:
        absent |= _causal_conv1d()
    hidden = {name: sys.modules[name] for name in absent if name in sys.modules}
    sys.modules.update(absent)
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
        sys.modules.update(hidden)


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    compile_function = torch.compile

    def keep(function: Any = None, **options: Any) -> Any:
        return keep if function is None else function

    torch.compile = keep  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_function


def import_core_with_stand_ins(platform: Platform) -> None:
    """Import megatron-core's training path, its Mamba mixer with the stand-ins in place."""
    compiling = contextlib.nullcontext() if platform.device_type == "cuda" else _uncompiled()
    with compiling, warnings.catch_warnings():
        # Said once per module by megatron-core where Transformer Engine and apex are absent; the
        # torch layer spec is chosen on purpose there.
        warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed")
        for name in CORE_MODULES:
            importlib.import_module(name)
        with stand_ins(platform):
            importlib.import_module(MODULE_THAT_INSISTS)
