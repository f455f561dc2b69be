"""The names of megatron-core that the engine relies on and that no release note protects.

When megatron-core moves one, the failure names it and the file of the engine to look at.
"""

import dataclasses
import functools
import importlib
import importlib.metadata
import inspect
from typing import Any

import pytest

from megatron_vl.engine.platform import SUPPORTED_CORE_SERIES
from megatron_vl.model.vlm import VisionLanguageModel

VERSION = importlib.metadata.version("megatron-core")

NAMES = {
    "cpu_port.py": [
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron.core.utils:torch",
        "megatron.core.optimizer.optimizer:torch",
        "megatron.core.optimizer.clip_grads:torch",
        "megatron.core.pipeline_parallel.schedules:torch",
        "megatron.core.distributed.param_and_grad_buffer:torch",
    ],
    "missing_packages.py": [
        "megatron.core.ssm.mamba_mixer:RMSNormGated",
        "megatron.core.ssm.mamba_mixer:mamba_chunk_scan_combined",
        "megatron.core.ssm.mamba_mixer:mamba_split_conv1d_scan_combined",
        "megatron.core.ssm.mamba_mixer:HAVE_MAMBA_SSM",
    ],
    "hybrid_stack.py": [
        "megatron.core.ssm.mamba_mixer:MambaMixer._ssm_training",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_A_log",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_D",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_conv1d_bias",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_conv1d_weight",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.get_dt_bias",
        "megatron.core.ssm.mamba_block:MambaStack",
        "megatron.core.ssm.mamba_block:MambaStackSubmodules",
    ],
    "context_parallel.py": [
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.pre_conv_ssm",
        "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.post_conv_ssm",
        "megatron.core.tensor_parallel.mappings:all_to_all",
        "megatron.core.tensor_parallel.mappings:gather_from_sequence_parallel_region",
    ],
    "checkpoint_writer.py": [
        "megatron.core.dist_checkpointing.strategies.torch:"
        "_replace_state_dict_keys_with_sharded_keys",
        "megatron.core.dist_checkpointing.strategies.torch:mcore_to_pyt_state_dict",
        "megatron.core.dist_checkpointing.strategies.torch:TorchDistSaveShardedStrategy.async_save",
        "megatron.core.dist_checkpointing.strategies.state_dict_saver:save_state_dict_async_plan",
        "torch.distributed.checkpoint.filesystem:_write_item",
        "torch.distributed.checkpoint.api:_wrap_exception",
    ],
    "optimizer_state.py": [
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_dp_reshardable",
        "megatron.core.optimizer:ChainedOptimizer",
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        "megatron.core.optimizer.distrib_optimizer:"
        "DistributedOptimizer.load_parameter_state_from_fully_reshardable",
    ],
    "packed.py": ["megatron.core.packed_seq_params:PackedSeqParams"],
    "process_groups.py": [
        "megatron.core.parallel_state:initialize_model_parallel",
        "megatron.core.parallel_state:destroy_model_parallel",
        "megatron.core.process_groups_config:ProcessGroupCollection.use_mpu_process_groups",
        "megatron.core.tensor_parallel.random:model_parallel_cuda_manual_seed",
    ],
    "recompute.py": [
        "megatron.core.ssm.mamba_layer:MambaLayer.forward",
        "megatron.core.ssm.mlp_layer:MLPLayer",
        "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention",
        "megatron.core.tensor_parallel.random:get_cuda_rng_tracker",
        "megatron.core.extensions.transformer_engine:te_checkpoint",
    ],
    "sharding.py": [
        "megatron.core.dist_checkpointing.dict_utils:nested_values",
        "megatron.core.dist_checkpointing.mapping:apply_factories",
        "megatron.core.dist_checkpointing.mapping:ShardedTensor.global_slice",
        "megatron.core.tensor_parallel.layers:set_tensor_model_parallel_attributes",
        "megatron.core.tensor_parallel.layers:VocabParallelEmbedding",
    ],
    "meta.py": ["torch.testing._internal.distributed.fake_pg:FakeStore"],
}
PARAMETERS = {
    "megatron.core.ssm.mamba_layer:MambaLayer.forward": ["self", "hidden_states"],
    "megatron.core.transformer.transformer_layer:TransformerLayer._forward_attention": [
        "self",
        "hidden_states",
    ],
    "megatron.core.extensions.transformer_engine:te_checkpoint": [
        "forward_func",
        "distribute_saved_activations",
        "get_rng_state_tracker",
        "tp_group",
    ],
    "megatron.core.ssm.mamba_mixer:MambaMixer._ssm_training": ["self", "zxBCdt"],
    "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.pre_conv_ssm": [
        "self",
        "input_",
        "packed_seq_params",
    ],
    "megatron.core.ssm.mamba_context_parallel:MambaContextParallel.post_conv_ssm": [
        "self",
        "input_",
        "packed_seq_params",
    ],
    "megatron.core.tensor_parallel.mappings:all_to_all": ["group", "input_"],
    "megatron.core.tensor_parallel.mappings:gather_from_sequence_parallel_region": [
        "input_",
        "tensor_parallel_output_grad",
        "group",
    ],
    "megatron.core.tensor_parallel.random:_get_cuda_rng_state": ["device", "clone", "graph_safe"],
    "megatron.core.tensor_parallel.random:_set_cuda_rng_state": ["state"],
    "megatron.core.tensor_parallel.layers:set_tensor_model_parallel_attributes": [
        "tensor",
        "is_parallel",
        "dim",
        "stride",
    ],
}


def moved(name: str, file: str) -> str:
    return (
        f"megatron-core {VERSION} has no {name}, which megatron_vl/engine/{file} relies on; "
        f"find where it went before widening SUPPORTED_CORE_SERIES ({SUPPORTED_CORE_SERIES}x)"
    )


def find(name: str, file: str) -> Any:
    module, _, path = name.partition(":")
    try:
        return functools.reduce(getattr, path.split("."), importlib.import_module(module))
    except (ImportError, AttributeError):
        pytest.fail(moved(name, file))


@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file, names in NAMES.items() for name in names]
)
def test_the_name_exists(file: str, name: str) -> None:
    found = find(name, file)
    expected = PARAMETERS.get(name, [])
    if expected:
        parameters = list(inspect.signature(found).parameters)
        assert parameters[: len(expected)] == expected, f"{name}{inspect.signature(found)}: {file}"


def test_a_moved_name_is_reported_clearly() -> None:
    with pytest.raises(pytest.fail.Exception, match=r"no megatron\.core\.utils:gone.*cpu_port\.py"):
        find("megatron.core.utils:gone", "cpu_port.py")


def test_the_mixer_still_calls_what_is_overridden(model: VisionLanguageModel) -> None:
    """The override is reached through `forward`, and reads these attributes of a built mixer."""
    mixer = next(
        module for name, module in model.named_modules() if name.endswith("layers.0.mixer")
    )
    core = find("megatron.core.ssm.mamba_mixer:MambaMixer", "hybrid_stack.py")
    assert isinstance(mixer, core)
    assert "self._ssm_training(" in inspect.getsource(core.forward)
    for attribute in ("cp", "chunk_size", "activation", "headdim", "norm_before_gate", "norm"):
        assert hasattr(mixer, attribute), moved(f"MambaMixer.{attribute}", "hybrid_stack.py")
    assert mixer.rmsnorm
    assert not mixer.D_has_hdim
    assert isinstance(mixer.cp.ngroups_local_tpcp, int)


def test_the_stack_still_ends_as_the_override_expects(model: VisionLanguageModel) -> None:
    stack = model.language_model.decoder
    core = find("megatron.core.ssm.mamba_block:MambaStack", "hybrid_stack.py")
    forward = inspect.getsource(core.forward)
    assert "self.post_layer_norm" in forward
    assert "self.final_norm(" in forward
    assert stack.pp_group.size() == 1


def test_fields_that_specs_fill_exist() -> None:
    submodules = find("megatron.core.ssm.mamba_block:MambaStackSubmodules", "hybrid_stack.py")
    assert {"mamba_layer", "attention_layer", "mlp_layer"} <= {
        field.name for field in dataclasses.fields(submodules)
    }
    packed = find("megatron.core.packed_seq_params:PackedSeqParams", "packed.py")
    assert {
        "qkv_format",
        "cu_seqlens_q",
        "cu_seqlens_kv",
        "cu_seqlens_q_padded",
        "cu_seqlens_kv_padded",
        "max_seqlen_q",
        "max_seqlen_kv",
    } <= {field.name for field in dataclasses.fields(packed)}
