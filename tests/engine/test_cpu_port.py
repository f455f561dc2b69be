"""What stands in for CUDA on a machine without it, and that nothing slipped past it."""

import ast
import importlib
from pathlib import Path

import pytest
import torch

from megatron_vl.engine import cpu_port
from megatron_vl.engine.platform import PLATFORM
from tests.conftest import LAPTOP, TINY, SmallData
from tests.engine.scan import literals, modules_of_a_step
from tests.support.ranks import RankPool

pytestmark = pytest.mark.skipif(
    PLATFORM.device_type == "cuda", reason="nothing stands in for CUDA where it is"
)

# Modules that a training rank imports and that name the device "cuda" where it never comes.
NEVER_REACHED = {
    "megatron.core.dist_checkpointing.strategies.state_dict_saver": "plans of an earlier save",
    "megatron.core.distributed.fsdp": "Megatron's FSDP, not used",
    "megatron.core.distributed.torch_fully_sharded_data_parallel": "torch's FSDP, not used",
    "megatron.core.extensions.transformer_engine": "Transformer Engine needs CUDA",
    "megatron.core.fp8_utils": "FP8 parameters need Transformer Engine",
    "megatron.core.fusions.fused_indices_converter": "mixture of experts",
    "megatron.core.nccl_allocator": "NCCL buffers",
    "megatron.core.optimizer.cpu_offloading": "an optimizer offloaded from a GPU",
    "megatron.core.optimizer.grad_scaler": "loss scaling, for float16 alone",
    "megatron.core.pipeline_parallel.combined_1f1b": "overlapped mixture of experts",
    "megatron.core.pipeline_parallel.fine_grained_activation_offload": "activation offload",
    "megatron.core.pipeline_parallel.hybrid_cp_schedule": "hybrid context parallelism",
    "megatron.core.pipeline_parallel.utils": "a stream, for which an idle one stands in",
    "megatron.core.rerun_state_machine": "reruns are off",
    "megatron.core.ssm.mamba_block": "inference",
    "megatron.core.tensor_parallel.data": "batches are read by every rank, not broadcast",
    "megatron.core.tensor_parallel.layers": "the device type of autocast, which is off",
    "megatron.core.tensor_parallel.random": "the functions that patch_core replaces",
    "megatron.core.transformer.fsdp_dtensor_checkpoint": "FSDP checkpoints",
    "megatron.core.transformer.moe": "mixture of experts",
    "megatron.core.transformer.utils": "masks of the unfused softmax",
}
# Calls in patched modules that name "cuda" outside torch's factories, and why they do no harm.
HARMLESS = {"torch.autocast": "only with config.enable_autocast", "symm_mem.empty": "needs NVLS"}


def test_factories_map_the_literal_and_nothing_else() -> None:
    view = cpu_port.TorchOnCpu()
    drawn = torch.randn(3)
    assert view.tensor([1.5, 2.5], device="cuda").tolist() == [1.5, 2.5]
    assert view.full((2,), 7, device="cuda").tolist() == [7, 7]
    assert view.zeros_like(drawn, device="cuda").device == cpu_port.CPU
    for name in cpu_port.FACTORIES:
        if name not in ("tensor", "full") and not name.endswith("_like"):
            assert getattr(view, name)((2, 3), device="cuda").device == cpu_port.CPU, name
    assert view.zeros((2,), device="meta").device.type == "meta"
    assert view.zeros((2,), dtype=torch.int32).dtype == torch.int32
    assert view.Tensor is torch.Tensor
    assert view.distributed is torch.distributed
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = view.no_such_name


def test_the_view_of_torch_is_where_it_is_needed_alone() -> None:
    for name in cpu_port.MODULES_WITH_CUDA_LITERALS:
        assert isinstance(importlib.import_module(name).torch, cpu_port.TorchOnCpu), name
    for name in ("tensor_parallel.layers", "ssm.mamba_mixer", "transformer.attention"):
        assert importlib.import_module(f"megatron.core.{name}").torch is torch


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float32, "torch.cuda.FloatTensor"),
        (torch.bfloat16, "torch.cuda.BFloat16Tensor"),
        (torch.float16, "torch.cuda.HalfTensor"),
    ],
    ids=str,
)
def test_type_without_arguments_reports_the_cuda_name(dtype: torch.dtype, name: str) -> None:
    tensor = torch.randn(4).to(dtype)
    assert tensor.type() == name
    assert torch.nn.Parameter(tensor).type() == name


def test_type_with_an_argument_still_converts() -> None:
    tensor = torch.randn(4)
    converted = tensor.type(torch.float64)
    assert converted.dtype == torch.float64
    assert torch.equal(converted, tensor.double())
    assert tensor.type("torch.DoubleTensor").dtype == torch.float64


def test_preparing_twice_wraps_once() -> None:
    before = torch.Tensor.type
    cpu_port.stand_in_for_cuda()
    assert torch.Tensor.type is before
    assert torch.randn(2).type() == "torch.cuda.FloatTensor"


def test_the_tracked_generator_is_the_cpu_one() -> None:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        state = random._get_cuda_rng_state()
        first = torch.randn(8)
        random._set_cuda_rng_state(state)
        assert torch.equal(torch.randn(8), first)


@pytest.mark.distributed
def test_no_cuda_literal_is_left_on_the_training_path(small_data: SmallData) -> None:
    """Reads the installed source of every module that a rank has imported after a step: a rank of
    its own, as those of the shared pool have imported what other tests needed."""
    overrides = [
        small_data.override,
        *TINY,
    ]
    pool = RankPool(1)
    modules = pool.run(1, modules_of_a_step, LAPTOP / "stage1.yaml", overrides)[0]
    pool.close()
    patched = set(cpu_port.MODULES_WITH_CUDA_LITERALS)
    assert patched <= set(modules)
    used: set[str] = set()
    for name, file in modules.items():
        found = literals(Path(file))
        if name in patched:
            assert found, f"{name} names no CUDA device any more; take it off the list"
            for line, node in found:
                assert _is_handled(node), f"{name}:{line}: {ast.unparse(node)}"
        elif found:
            reasons = [known for known in NEVER_REACHED if f"{name}.".startswith(f"{known}.")]
            lines = [line for line, _ in found]
            assert reasons, f"{name} names the device cuda in lines {lines}; patch or allow it"
            used |= set(reasons)
    assert used == set(NEVER_REACHED), "allowed without need"


def _is_handled(node: ast.AST) -> bool:
    """A call of one of torch's mapped factories, or a harmless one."""
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    return called in HARMLESS or called in {f"torch.{name}" for name in cpu_port.FACTORIES}
