"""The gates of the two recipes: what each waits for, and what passed and failed when measured."""

import pytest

from launch.gates import judge
from launch.graph import starts_from
from megatron_vl.config.recipe import Recipe, gate_of, load_graph
from tests.conftest import LAPTOP, REPOSITORY

# Held-out loss of code by `mvl evaluate`, 64 samples, in one run of the recipe (docs/log.md).
MEASURED = {"stage1": 4.0123, "stage2": 4.2490, "stage3": 3.9623}


@pytest.fixture(scope="module")
def laptop() -> Recipe:
    return load_graph(LAPTOP)


def test_both_recipes_end_in_a_release_of_three_formats(laptop: Recipe) -> None:
    large = load_graph(REPOSITORY / "stages" / "nano_12b_v2_vl")
    for recipe, students in ((laptop, ("qad_fp8", "qad_nvfp4")), (large, ("qad_nvfp4",))):
        assert recipe.graph.names[-1] == "release"
        assert recipe.graph.parents["release"] == ("stage4", *students)
        from_stages = [name for name in starts_from(recipe) if name.startswith("stage")]
        assert from_stages == ["stage0", "stage1", "stage2", "stage3", "stage4"]
        assert {starts_from(recipe)[name] for name in from_stages} == {
            "init", "stage0", "stage1", "stage2", "stage3",
        }  # fmt: skip


@pytest.mark.parametrize(
    ("skip", "measured", "passes"), [((), "stage3", True), (("stage3",), "stage2", False)]
)
def test_the_laptop_gate_fails_when_the_recovery_stage_is_skipped(
    laptop: Recipe, skip: tuple[str, ...], measured: str, passes: bool
) -> None:
    starts = starts_from(laptop, skip)
    assert (starts["code_stage3"], starts["code_stage1"]) == (measured, "stage1")
    assert laptop.graph.without(skip).parents["stage4"] == ("code_stage3",)
    gate = gate_of(laptop["code_stage3"].config)
    assert (gate.otherwise, gate.reference) == ("hold", "code_stage1")
    (check,) = judge(gate, {"code.loss": MEASURED[measured]}, {"code.loss": MEASURED["stage1"]})
    assert check.passed is passes


def test_the_published_failure_signatures_hold_the_large_recipe() -> None:
    """Values of arXiv 2511.03929, tables 4 and 6, after the stages named."""
    recipe = load_graph(REPOSITORY / "stages" / "nano_12b_v2_vl")
    gates = {entry.name: gate_of(entry.config) for entry in recipe.entries}
    video = {"video_mme.score": 65.8, "longvideobench.score": 63.6}
    after = {
        "text_stage3": {"livecodebench.accuracy": 69.8},
        "text_stage4": {"livecodebench.accuracy": 69.4, "ruler.accuracy": 72.1},
        "vision_stage4": {"ocrbench_v2_en.score": 62.0, "video_mme.score": 66.0,
                          "longvideobench.score": 63.6},
    }  # fmt: skip
    for name, metrics in after.items():
        assert all(check.passed for check in judge(gates[name], metrics, video)), name
    failing = {
        "text_stage3": {"livecodebench.accuracy": 50.9},
        "text_stage4": {"livecodebench.accuracy": 69.4, "ruler.accuracy": 21.5},
        "vision_stage4": {"ocrbench_v2_en.score": 57.6, "video_mme.score": 63.7,
                          "longvideobench.score": 63.6},
    }  # fmt: skip
    wrong = {
        name: [check.metric for check in judge(gates[name], metrics, video) if not check.passed]
        for name, metrics in failing.items()
    }
    assert wrong == {
        "text_stage3": ["livecodebench.accuracy"],
        "text_stage4": ["ruler.accuracy"],
        "vision_stage4": ["ocrbench_v2_en.score", "video_mme.score"],
    }
    assert [gates[name].otherwise for name in failing] == ["hold"] * 3
    assert recipe.graph.parents["stage4"] == ("text_stage3",)
    assert recipe.graph.parents["qad_nvfp4"] == ("vision_stage4",)
