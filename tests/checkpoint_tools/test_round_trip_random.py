"""Models nobody chose: published folder to stage folder and back, bitwise."""

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from checkpoint_tools.export_hf import ExportOptions, export
from checkpoint_tools.import_hf import import_folder
from checkpoint_tools.name_rules import Growth, name_table
from megatron_vl.config.load import to_yaml
from megatron_vl.config.schema import Precision, StageConfig
from megatron_vl.config.schema_model import DecoderConfig
from tests.checkpoint_tools.conftest import SHARD_BYTES, Published, quiet
from tests.checkpoint_tools.published import VOCABULARY, read_all, tiny_stage, write_published


@st.composite
def stages(draw: Any) -> StageConfig:
    """A tiny stage: any order of layers, any grouping of heads, of groups and of prefix tokens."""
    stage = tiny_stage(prefix=draw(st.integers(1, 17)))
    groups, queries = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    mamba_groups, repeats = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    stage.model.decoder = DecoderConfig(
        pattern=draw(st.text("M-*", min_size=1, max_size=6)),
        hidden_size=8 * draw(st.integers(2, 5)),
        ffn_hidden_size=8 * draw(st.integers(1, 7)),
        num_attention_heads=groups * queries,
        num_query_groups=groups,
        head_dim=2 * draw(st.integers(2, 9)),
        mamba_num_heads=mamba_groups * repeats,
        mamba_head_dim=4 * draw(st.integers(1, 4)),
        mamba_state_dim=4 * draw(st.integers(1, 5)),
        mamba_num_groups=mamba_groups,
        mamba_chunk_size=16,
    )
    heads = draw(st.integers(1, 5))
    stage.model.encoder = replace(
        stage.model.encoder,
        num_layers=draw(st.integers(1, 3)),
        hidden_size=heads * 4 * draw(st.integers(1, 3)),
        ffn_hidden_size=8 * draw(st.integers(1, 5)),
        num_attention_heads=heads,
    )
    stage.model.projector.ffn_hidden_size = 8 * draw(st.integers(1, 6))
    stage.precision = draw(st.sampled_from([Precision.fp32, Precision.bf16]))
    return stage


def distinct(stage: StageConfig, seed: int) -> dict[str, Tensor]:
    """Random bits as weights, every pattern but NaN: what rounds or reorders anything shows."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float32 if stage.precision is Precision.fp32 else torch.bfloat16
    made = {}
    for name, slot in name_table(stage.model).published().items():
        whole = torch.randint(-(2**31), 2**31, slot.shape, generator=generator, dtype=torch.int64)
        value = whole.int().view(torch.float32).nan_to_num(0.25, 1.5, -1.5)
        made[name] = value.to(dtype).nan_to_num(0.5, 2.5, -2.5)
    return made


@given(stages(), st.integers(0, 2**31))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_any_model_comes_back(published: Published, stage: StageConfig, seed: int) -> None:
    """Through the files; with a padded vocabulary the padding stays behind."""
    tensors = distinct(stage, seed)
    with tempfile.TemporaryDirectory() as base:
        place = Path(base)
        folder = write_published(place / "a", stage, tensors, published.tokenizer, 1 + seed % 3)
        like = place / "like.yaml"
        stage.model.padded_vocab_size = VOCABULARY + 16 * (seed % 4)
        like.write_text(to_yaml(stage))
        import_folder(folder, place / "stage", like, 1, quiet)
        form = "fp32" if stage.precision is Precision.fp32 else "bf16"
        export(place / "stage", place / "b", ExportOptions(form, SHARD_BYTES), quiet)
        back = read_all(place / "b")
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype, name
        assert back[name].equal(tensor), name


@given(stages(), st.integers(0, 2**31), st.integers(1, 700), st.integers(0, 40))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_table_is_undone(stage: StageConfig, seed: int, vocabulary: int, padding: int) -> None:
    """Rule by rule in memory, at odd vocabularies; every stored number is placed."""
    model = replace(stage.model, vocab_size=vocabulary, padded_vocab_size=vocabulary + padding)
    table = name_table(model, Growth(vocabulary, model.encoder.num_prefix_tokens, seed))
    generator = torch.Generator().manual_seed(seed)
    for rule in table.rules:
        given_ = [torch.randn(slot.shape, generator=generator) for slot in rule.published]
        stored = rule.to_stored(given_)
        assert [tuple(t.shape) for t in stored] == [slot.shape for slot in rule.stored]
        back = rule.to_published([tensor.contiguous() for tensor in stored])
        assert all(a.equal(b) for a, b in zip(given_, back, strict=True)), rule.stored
