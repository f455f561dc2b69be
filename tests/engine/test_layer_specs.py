"""The Transformer Engine spec has megatron-core's own modules in megatron-core's own slots."""

import dataclasses
import importlib
from typing import Any

import pytest
from megatron.core.transformer.spec_utils import ModuleSpec

from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.engine import layer_specs
from megatron_vl.engine.hybrid_stack import HybridStack, PackedMambaMixer
from megatron_vl.engine.layer_specs import Blocks
from megatron_vl.engine.platform import PLATFORM
from megatron_vl.engine.recompute import (
    RecomputableMambaLayer,
    RecomputableMLPLayer,
    RecomputableTransformerLayer,
)
from megatron_vl.model.vlm import VisionLanguageModel
from tests.model.test_sizes import NAMES, NANO_12B
from tests.support.one_rank import one_rank


@pytest.fixture(scope="module")
def published() -> Any:
    """The module of megatron-core's hybrid spec; its names exist without Transformer Engine."""
    return importlib.import_module("megatron.core.models.mamba.mamba_layer_specs")


@pytest.fixture(scope="module")
def theirs(published: Any) -> Blocks:
    """The blocks that megatron-core's spec is made of."""
    return Blocks(
        norm_linear=published.TELayerNormColumnParallelLinear,
        row_linear=published.TERowParallelLinear,
        core_attention=published.TEDotProductAttention,
        norm=published.TENorm,
    )


def slots(spec: Any, path: str = "") -> dict[str, Any]:
    """Every module of a spec by its dotted slot; parameters of a spec too."""
    if not isinstance(spec, ModuleSpec):
        return {path: spec}
    found = {path: spec.module}
    found |= {f"{path}({name})": value for name, value in spec.params.items()}
    if spec.submodules is not None:
        for field in dataclasses.fields(spec.submodules):
            inner = getattr(spec.submodules, field.name)
            found |= slots(inner, f"{path}.{field.name}" if path else field.name)
    return found


def test_decoder_slots_are_megatron_cores(published: Any, theirs: Blocks) -> None:
    """But for what this project replaces on purpose: the stack, the mixer, the final norm, and
    layers that can recompute."""
    ours = slots(layer_specs.hybrid_decoder_spec(theirs, 256))
    core = {
        slot: module
        for slot, module in slots(published.mamba_stack_spec).items()
        if not slot.startswith("moe_layer")
    }
    own = {
        "": HybridStack,
        "mamba_layer": RecomputableMambaLayer,
        "mamba_layer.mixer": PackedMambaMixer,
        "attention_layer": RecomputableTransformerLayer,
        "mlp_layer": RecomputableMLPLayer,
        "mamba_layer.mixer(chunk_size)": 256,
        "final_norm": theirs.norm,
    }
    for slot, module in own.items():
        assert ours.pop(slot) is module, slot
        replaced = core.pop(slot, None)
        if isinstance(replaced, type):
            assert issubclass(module, replaced), slot
    ours = {slot: module for slot, module in ours.items() if not slot.startswith("moe_layer")}
    core = {slot: module for slot, module in core.items() if not slot.startswith("mtp")}
    assert ours == core


def test_encoder_layer_slots_are_megatron_cores_vit(theirs: Blocks) -> None:
    vit = importlib.import_module("megatron.core.models.vision.vit_layer_specs")
    core = slots(vit.get_vit_layer_with_transformer_engine_spec())
    ours = slots(layer_specs.encoder_layer_spec(theirs))
    assert ours.pop("") is RecomputableTransformerLayer
    assert issubclass(RecomputableTransformerLayer, core.pop(""))
    assert ours == core


def test_both_specs_fill_the_same_slots(theirs: Blocks) -> None:
    torch_spec = slots(layer_specs.hybrid_decoder_spec(layer_specs.TORCH_BLOCKS, 256))
    te_spec = slots(layer_specs.hybrid_decoder_spec(theirs, 256))
    assert te_spec.keys() == torch_spec.keys()
    roles = [field.name for field in dataclasses.fields(Blocks)]
    filled = set()
    for slot, module in te_spec.items():
        role = next((role for role in roles if getattr(theirs, role) is module), None)
        expected = module if role is None else getattr(layer_specs.TORCH_BLOCKS, role)
        assert torch_spec[slot] == expected, slot
        filled.add(role)
    assert filled == {*roles, None}


def test_blocks_follow_the_platform(monkeypatch: pytest.MonkeyPatch, theirs: Blocks) -> None:
    bare = dataclasses.replace(PLATFORM, has_transformer_engine=False)
    full = dataclasses.replace(PLATFORM, has_transformer_engine=True)
    monkeypatch.setattr(layer_specs, "transformer_engine_blocks", lambda: theirs)
    assert layer_specs.blocks_for(bare) is layer_specs.TORCH_BLOCKS
    assert layer_specs.blocks_for(full) is theirs


@pytest.mark.gpu
@pytest.mark.skipif(not PLATFORM.has_transformer_engine, reason="needs Transformer Engine")
def test_transformer_engine_model_has_the_committed_parameter_names() -> None:
    """A shallow model of the published widths, really built."""
    model = dataclasses.replace(
        NANO_12B,
        decoder=dataclasses.replace(NANO_12B.decoder, pattern="M-*"),
        encoder=dataclasses.replace(NANO_12B.encoder, num_layers=1),
    )
    with one_rank() as groups:
        built = VisionLanguageModel(
            model,
            ParallelConfig(),
            Precision.bf16,
            layer_specs.transformer_engine_blocks(),
            groups,
            sequence_length=1024,
        )
    names = {
        ".".join("N" if word.isdigit() else word for word in name.split("."))
        for name, _ in built.named_parameters()
    }
    assert sorted(names) == NAMES.read_text().splitlines()
