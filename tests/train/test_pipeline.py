"""Pipeline stages of every make compute what one rank computes, and impossible ones are refused."""

import pytest

from megatron_vl.config.check import check_stage
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.cost.recompute import pipeline_stages
from tests.conftest import LAPTOP
from tests.support.gradients import assert_equal_gradients, batch_gradients
from tests.support.ranks import RankPool
from tests.support.sizes import PATTERN_12B

FILE = LAPTOP / "stage1.yaml"
COMMON = ["data.sequence_length=256", "parallel.data=1"]
MIXED = ["pictures", "text", "pictures", "text"]

PP2, PP4 = "parallel.pipeline=2", "parallel.pipeline=4"
SLOW = pytest.mark.slow


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stages", "layout"),
    [
        pytest.param(["M*M-", "----"], [PP2], id="last-stage-of-MLPs"),
        pytest.param(["----", "M*M-"], [PP2], id="first-stage-of-MLPs", marks=SLOW),
        pytest.param(["M*-", "---", "--M", "-*M"], [PP4], id="middle-stage-of-MLPs", marks=SLOW),
        pytest.param(
            ["M", "-M*", "-MM", "---"], [PP4, "parallel.first_stage_layers=1"], id="uneven"
        ),
        pytest.param(
            ["M-M*-M", "--"],
            [PP2, "parallel.first_stage_layers=6", "parallel.tensor=2", "parallel.sequence=true"],
            id="uneven-TP2-SP",
            marks=SLOW,
        ),
    ],
)
def test_stages_have_the_gradients_of_one_rank(
    ranks: RankPool, stages: list[str], layout: list[str]
) -> None:
    pattern = "".join(stages)
    common = [*COMMON, f"model.decoder.pattern={pattern}"]
    config = load_stage(FILE, [*common, *layout])
    assert pipeline_stages(pattern, config.parallel) == stages
    alone = ranks.run(1, batch_gradients, FILE, common, MIXED)[0]
    together = ranks.run(config.parallel.ranks, batch_gradients, FILE, [*common, *layout], MIXED)
    gradients = assert_equal_gradients(together, alone)
    prefix = "language_model.decoder.layers."
    layers = {key.removeprefix(prefix).split(".")[0] for key in gradients if key.startswith(prefix)}
    assert layers == {str(index) for index in range(len(pattern))}
    assert all(float(gradient.norm()) > 0 for gradient in gradients.values())


@pytest.mark.distributed
@pytest.mark.parametrize(
    "layout",
    [
        pytest.param([PP2], id="PP2", marks=SLOW),
        pytest.param([PP2, "parallel.data=2"], id="PP2-DP2"),
        pytest.param([PP4], id="PP4", marks=SLOW),
    ],
)
def test_stages_on_which_nothing_learns(ranks: RankPool, layout: list[str]) -> None:
    """The projector sits on the first stage; the others pass gradients on and hold none."""
    common = [*COMMON, "train.trainable=[projector]"]
    alone = ranks.run(1, batch_gradients, FILE, common, MIXED)[0]
    config = load_stage(FILE, [*common, *layout])
    together = ranks.run(config.parallel.ranks, batch_gradients, FILE, [*common, *layout], MIXED)
    gradients = assert_equal_gradients(together, alone)
    assert gradients
    assert all(key.startswith("vision_projection.") for key in gradients)
    holders = [bool(rank.parts) for rank in together]
    per_stage = config.parallel.ranks // config.parallel.pipeline
    assert holders == [True] * per_stage + [False] * (len(holders) - per_stage)


def full_recipe(*overrides: str) -> StageConfig:
    """A stage with the published pattern of 62 layers; its numbers are checked, not run."""
    return load_stage(FILE, [*COMMON, f"model.decoder.pattern={PATTERN_12B}", *overrides])


def test_the_published_layers_split_as_14_and_three_times_16() -> None:
    with pytest.raises(ConfigError, match=r"pipeline 4 cannot split.*first_stage_layers 14"):
        full_recipe("parallel.pipeline=4")
    config = full_recipe("parallel.pipeline=4", "parallel.first_stage_layers=14")
    stages = pipeline_stages(PATTERN_12B, config.parallel)
    assert [len(stage) for stage in stages] == [14, 16, 16, 16]
    with pytest.raises(ConfigError, match=r"first_stage_layers is 16.*nearest valid: (14|17)"):
        full_recipe("parallel.pipeline=4", "parallel.first_stage_layers=16")


@pytest.mark.parametrize("slices", [0, 2])
def test_interleaved_pipelines_are_refused_with_the_reason(slices: int) -> None:
    config = full_recipe()
    config.parallel.virtual_pipeline = slices
    (problem,) = check_stage(config)
    assert problem == (
        f"parallel.virtual_pipeline is {slices}, but megatron-core's hybrid stack refuses "
        "interleaved pipelines; nearest valid: 1"
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["recompute.decoder=63"], "recompute.decoder is 63, but the decoder has 62 layers.*62$"),
        (["recompute.encoder=5"], "recompute.encoder is 5, but the encoder has 4 layers.*4$"),
        (["recompute.decoder=-1"], "recompute.decoder is -1, must be at least 0"),
        (["recompute.decoder=1", "recompute.kinds=[]"], "kinds is empty.*recompute.decoder 0"),
        (["train.loss_chunk=0"], "train.loss_chunk is 0, must be at least 1"),
    ],
)
def test_recompute_and_loss_chunks_that_cannot_be(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        full_recipe(*overrides)
