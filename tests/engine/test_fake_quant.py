"""Which linears are fake-quantized, by what numbers, and what they then multiply."""

from collections.abc import Iterator

import pytest
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from checkpoint_tools import quantize
from checkpoint_tools.name_rules import name_table
from checkpoint_tools.quantized_layout import (
    FP8,
    MODELOPT,
    NVFP4,
    Quantization,
    applies,
    quantized_modules,
    quantizer,
)
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_distill import StudentFormat
from megatron_vl.engine.fake_quant import FakeQuantized
from megatron_vl.engine.input_amax import SUFFIX, InputAmax, decoder_linears, published
from megatron_vl.engine.sharding import sharded_tensors
from megatron_vl.model.vlm import VisionLanguageModel
from tests.conftest import LAPTOP
from tests.engine import fake_quant_jobs
from tests.kernels.test_nvfp4 import decoded
from tests.support.models import perturbed_model
from tests.support.ranks import RankPool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def student() -> StageConfig:
    return load_stage(LAPTOP / "qad_nvfp4.yaml", ["parallel.data=1"])


@pytest.fixture(scope="module")
def model(student: StageConfig) -> Iterator[VisionLanguageModel]:
    with perturbed_model(student) as module:
        yield module


@pytest.fixture(scope="module")
def groups(model: VisionLanguageModel) -> ProcessGroupCollection:
    return model.language_model.pg_collection


def exported(config: StageConfig, stored: dict[str, Tensor], form: str) -> dict[str, Tensor]:
    """What an export of these weights decodes to, by stored name; quantized weights alone."""
    rules = [rule for rule in name_table(config.model).rules if applies(rule)]
    inputs = {module: torch.tensor(1.0) for module in quantized_modules(rules)}
    found = {}
    for rule in rules:
        made = quantizer(rule, Quantization(form, MODELOPT, inputs))(
            [stored[slot.name] for slot in rule.stored]
        )
        if form == NVFP4:
            each = zip(made[0::4], made[1::4], made[2::4], strict=True)
            values = [decoded(quantize.Fp4(codes, blocks), scale) for codes, blocks, scale in each]
        else:
            pairs = zip(made[0::3], made[1::3], strict=True)
            values = [data.float() * scale for data, scale in pairs]
        found |= zip((slot.name for slot in rule.stored), rule.to_stored(values), strict=True)
    return found


def test_the_linears_are_those_a_release_quantizes(
    model: VisionLanguageModel, student: StageConfig, groups: ProcessGroupCollection
) -> None:
    named = published(dict.fromkeys(decoder_linears(model), 1.0), groups)
    modules = quantized_modules(name_table(student.model).rules)
    assert named.keys() == {module + SUFFIX for module in modules}


@pytest.mark.parametrize("form", [FP8, NVFP4])
def test_weights_become_what_their_export_decodes_to(
    model: VisionLanguageModel, student: StageConfig, groups: ProcessGroupCollection, form: str
) -> None:
    """Of every linear, as the weights are at the last refresh."""
    layers = FakeQuantized(model, groups, StudentFormat(form))
    layers.quantize(dict.fromkeys(layers.linears, 4.0), (1, 1))
    with torch.no_grad():
        for linear in layers.linears.values():
            linear.weight.mul_(1.1)
    layers.refresh()
    stored = {s.key: s.data.detach() for s in sharded_tensors(model, groups)}
    expected = exported(student, stored, form)
    weights = {linear: linear.weight.data for linear in layers.linears.values()}
    for linear, weight in weights.items():
        assert linear.operands is not None
        linear.weight.data = linear.operands(weight, weight)[1]
    found = {shard.key: shard.data.detach().clone() for shard in sharded_tensors(model, groups)}
    for linear, weight in weights.items():
        linear.weight.data, linear.operands = weight, None
    assert len(expected) == 32
    for name, values in expected.items():
        assert torch.equal(found[name], values), name
    kept = {shard.key: shard.data for shard in sharded_tensors(model, groups)}
    assert not any(torch.equal(kept[name], values) for name, values in expected.items())


def test_the_recorder_sees_what_a_linear_multiplies(
    model: VisionLanguageModel, groups: ProcessGroupCollection
) -> None:
    """Behind the norm; the largest of two inputs; and it leaves no trace."""
    linears = decoder_linears(model)
    place, linear = next(iter(linears.items()))
    recorder = InputAmax({place: linear})
    inputs = torch.randn(2, 6, 1, linear.weight.shape[1])
    with recorder.recording():
        for each in inputs:
            linear(each)
    assert linear.operands is None
    weight = linear.layer_norm_weight.detach()
    normed = inputs / (inputs.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert recorder.agreed(groups)[place] == pytest.approx(float(normed.abs().max()), rel=1e-5)


def test_an_input_that_was_never_seen_is_refused(
    model: VisionLanguageModel, groups: ProcessGroupCollection
) -> None:
    recorder = FakeQuantized(model, groups, StudentFormat.nvfp4).recorder()
    with pytest.raises(ValueError, match=r"the largest input of decoder\.0\.mixer\.in_proj is 0"):
        recorder.agreed(groups)


@pytest.mark.parametrize("form", [FP8, NVFP4])
def test_tensor_ranks_hold_the_parts_of_one_ranks_values(ranks: RankPool, form: str) -> None:
    """The scale of a matrix is made of all of it, wherever its largest number lies."""
    file, common = LAPTOP / "qad_nvfp4.yaml", ["parallel.data=1", f"distill.student={form}"]
    (alone,) = ranks.run(1, fake_quant_jobs.values, file, common)
    split = [*common, "parallel.tensor=2", "parallel.sequence=true"]
    halves = ranks.run(2, fake_quant_jobs.values, file, split)
    assert len(alone) == 32
    for key, (_, values) in alone.items():
        for half in halves:
            ((top, bottom), (left, right)), part = half[key]
            assert torch.equal(part, values[top:bottom, left:right]), key
