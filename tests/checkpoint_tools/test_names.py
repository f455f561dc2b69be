"""The name table against the model's own tensors, transformers' own names, and the sizes of 12B."""

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

from checkpoint_tools import transforms
from checkpoint_tools.name_rules import Growth, name_table
from checkpoint_tools.names import NamesError
from checkpoint_tools.published_config import TokenIds, published_config
from checkpoint_tools.published_folder import PublishedFolder
from checkpoint_tools.torch_dist import DistributedCheckpoint, extra_state_names
from megatron_vl.config.schema import ParallelConfig, Precision
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.engine.layer_specs import TORCH_BLOCKS
from megatron_vl.engine.meta import meta_device, pretend_rank
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.vlm import VisionLanguageModel
from tests.checkpoint_tools import rank_jobs
from tests.checkpoint_tools.conftest import Published
from tests.checkpoint_tools.published import VOCABULARY, tiny_stage
from tests.support.ranks import RankPool
from tests.support.sizes import full_size

IDS = TokenIds(begin=1, end_of_turn=12, pad=0, image=502, video=511)


def shapes_of_model(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Stored names and global shapes as the real model describes them, without memory."""
    parallel = ParallelConfig()
    with pretend_rank(parallel, 0) as groups, meta_device():
        module = VisionLanguageModel(
            model, parallel, Precision.bf16, TORCH_BLOCKS, groups, sequence_length=64
        )
        return {s.key: tuple(s.global_shape) for s in sharded_tensors(module, groups)}


@pytest.mark.parametrize("model", [tiny_stage().model, full_size()], ids=["tiny", "12B"])
def test_the_stored_side_is_the_model(model: ModelConfig) -> None:
    name_table(model).check_stored(shapes_of_model(model), "the model")


def test_the_published_side_counts_every_parameter() -> None:
    model = full_size()
    slots = name_table(model).published().values()
    assert sum(torch.Size(slot.shape).numel() for slot in slots) == model_parameters(model).total


def test_published_names_are_those_transformers_writes(published: Published) -> None:
    """Its decoder's own names; `model.` is published as `backbone.`."""
    config = published_config(published.stage, VOCABULARY, "float32", IDS)
    text = transformers.NemotronHConfig(**config["llm_config"])
    decoder = transformers.NemotronHForCausalLM(text).state_dict()
    ours = name_table(published.stage.model).published()
    theirs = {
        "language_model." + n.replace("model.", "backbone.", 1): v for n, v in decoder.items()
    }
    decoder_slots = {n: s.shape for n, s in ours.items() if n.startswith("language_model.")}
    assert decoder_slots == {name: tuple(value.shape) for name, value in theirs.items()}


def reference_groups(query: Tensor, key: Tensor, value: Tensor, groups: int, width: int) -> Tensor:
    """Rows in stored order, one head at a time."""
    heads = query.shape[0] // width
    rows = []
    for group in range(groups):
        first = group * (heads // groups)
        for head in range(first, first + heads // groups):
            rows += list(query[head * width : (head + 1) * width])
        rows += list(key[group * width : (group + 1) * width])
        rows += list(value[group * width : (group + 1) * width])
    return torch.stack(rows)


@pytest.mark.parametrize(("heads", "groups"), [(4, 2), (6, 2), (5, 5), (4, 1)])
def test_grouped_queries_row_by_row(heads: int, groups: int) -> None:
    width = 3
    query, key, value = (torch.randn(n * width, 7) for n in (heads, groups, groups))
    stored = transforms.join_grouped_qkv([query, key, value], heads, groups, width)
    assert stored.equal(reference_groups(query, key, value, groups, width))
    back = transforms.split_grouped_qkv(stored, heads, groups, width)
    assert all(one.equal(other) for one, other in zip(back, (query, key, value), strict=True))


def test_encoder_heads_row_by_row() -> None:
    heads, width = 4, 3
    published = torch.arange(3 * heads * width)
    stored = transforms.heads_inside(published, heads)
    expected = [
        (part * heads + head) * width + row
        for head in range(heads)
        for part in range(3)
        for row in range(width)
    ]
    assert stored.tolist() == expected
    assert transforms.heads_outside(stored, heads).equal(published)


def test_every_rule_is_undone_by_its_inverse() -> None:
    """Both ways, with random tensors of the table's shapes."""
    table = name_table(tiny_stage().model)
    for rule in table.rules:
        for slots, there, back in (
            (rule.stored, rule.to_published, rule.to_stored),
            (rule.published, rule.to_stored, rule.to_published),
        ):
            tensors = [torch.randn(slot.shape) for slot in slots]
            returned = back([tensor.contiguous() for tensor in there(tensors)])
            assert all(a.equal(b) for a, b in zip(tensors, returned, strict=True)), rule.stored


def test_a_grown_vocabulary_keeps_its_rows_and_says_where_new_ones_come_from() -> None:
    table = torch.randn(50, 8, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(1)
    grown = transforms.grow_vocabulary(table, 450, 0.02, generator)
    assert grown.dtype == torch.bfloat16
    assert grown[:50].equal(table)
    moved = grown[50:].float() - table.float().mean(0)
    assert 0.017 < float(moved.std()) < 0.023
    assert len(grown[50:].unique(dim=0)) == 400


def test_prefix_tokens_are_put_in_front() -> None:
    released = torch.randn(8, 16)
    padded = transforms.prepend_prefix(released, 16, 0.02, torch.Generator().manual_seed(1))
    assert padded[8:].equal(released)
    assert 0.01 < float(padded[:8].std()) < 0.03


def test_growth_never_shrinks() -> None:
    model = tiny_stage().model
    with pytest.raises(ValueError, match=r"513 vocabulary rows.*model\.padded_vocab_size=513"):
        name_table(model, Growth(513, 16))
    with pytest.raises(ValueError, match=r"17 prefix tokens.*encoder\.num_prefix_tokens=17"):
        name_table(model, Growth(512, 17))


def test_one_error_lists_all_that_differs(published: Published) -> None:
    folder = PublishedFolder(published.folder)
    shapes = folder.shapes()
    table = name_table(published.stage.model)
    lost = "language_model.backbone.layers.0.mixer.A_log"
    del shapes[lost]
    shapes["language_model.backbone.layers.0.mixer.A_Log"] = (8,)
    prefix = "vision_model.radio_model.model.patch_generator.cls_token.token"
    shapes[prefix] = (8, 48)
    with pytest.raises(NamesError) as raised:
        table.check_published(shapes, "FOLDER")
    said = str(raised.value)
    assert f"missing: {lost} (there is language_model.backbone.layers.0.mixer.A_Log)" in said
    assert f"over: language_model.backbone.layers.0.mixer.A_Log (expected is {lost})" in said
    assert "is [8, 48], expected [16, 48], which model.encoder.num_prefix_tokens decides" in said
    assert said.count("\n") == 3


def test_a_long_list_is_cut(published: Published) -> None:
    with pytest.raises(NamesError, match=r"missing: and \d+ more") as raised:
        name_table(published.stage.model).check_published({}, "FOLDER")
    assert len(str(raised.value).splitlines()) == 10


@pytest.mark.distributed
def test_an_import_has_the_index_the_trainer_writes(
    stage_folder: Path, ranks: RankPool, tmp_path: Path
) -> None:
    """Names, shapes, types and extra state, as a rank saves the same weights."""
    saved = tmp_path / "step_000000"
    ranks.run(1, rank_jobs.load_and_save, stage_folder, ["precision=fp32"], saved)
    imported = DistributedCheckpoint(stage_folder / "checkpoints" / "step_000000")
    written = DistributedCheckpoint(saved)
    assert imported.stored == written.stored
    for name in written.stored:
        assert imported.read(name).equal(written.read(name)), name
    objects = [set(one._index.state_dict_metadata) - set(one.stored) for one in (imported, written)]
    assert objects[0] == objects[1] == set(extra_state_names(imported.stored))
