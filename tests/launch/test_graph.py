"""What a selection leaves of a graph, and what a recipe's files say about it."""

from pathlib import Path

import pytest

from launch.graph import Selection, folder_names, select, starts_from, takes
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.recipe import gate_of, load_graph
from megatron_vl.run.graph import make_graph
from tests.launch.node_recipe import stage, write_node_recipe

CHAIN = make_graph({"init": None, "stage0": None, "stage1": None, "stage2": None})
RELEASE = "node: release\nname: release\nformats: {bf16: stage1, nvfp4: qad}\n"


def test_bounds_of_a_chain() -> None:
    assert select(CHAIN, Selection("stage0", "stage1")) == ["stage0", "stage1"]
    assert select(CHAIN, Selection(skip=("stage1",))) == ["init", "stage0", "stage2"]
    with pytest.raises(ConfigError, match="--from stage9: no such stage; there are init"):
        select(CHAIN, Selection("stage9"))
    with pytest.raises(ConfigError, match="leave no stage"):
        select(CHAIN, Selection("stage2", "stage1"))


def test_from_and_until_follow_edges_and_not_the_list() -> None:
    graph = make_graph({"a": None, "b": None, "left": ["b"], "right": ["b"], "tip": ["right"]})
    assert select(graph, Selection(first="right")) == ["right", "tip"]
    assert select(graph, Selection(last="left")) == ["a", "b", "left"]
    assert select(graph, Selection(first="b", last="tip", skip=("right",))) == ["b", "tip"]


def test_a_recipe_of_stages_and_nodes(tmp_path: Path) -> None:
    folder = write_node_recipe(
        tmp_path / "recipe", qad=stage("qad", "after: stage1"), release=RELEASE
    )
    recipe = load_graph(folder)
    assert [(entry.name, entry.kind) for entry in recipe.entries] == [
        ("init", "train"), ("stage0", "train"), ("check", "evaluate"), ("stage1", "train"),
        ("qad", "train"), ("release", "release"),
    ]  # fmt: skip
    assert folder_names(recipe)["stage1"] == "03_stage1"
    assert starts_from(recipe) == {
        "init": None, "stage0": "init", "check": "stage0", "stage1": "stage0", "qad": "stage1",
        "release": "stage1",
    }  # fmt: skip
    assert starts_from(recipe, ["stage0", "check"])["stage1"] == "init"
    assert takes(recipe, "release") == {"bf16": "stage1", "nvfp4": "qad"}
    assert takes(recipe, "qad") == {}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"check": "node: evalute\nname: check\n"}, "check.yaml:1: node is 'evalute'.*evaluate"),
        ({"check": "node: evaluate\nname: check\n"}, "must be given a value: after"),
        (
            {"check": "node: evaluate\nname: check\nafter: stage0\nsuite: [code]\n"},
            "check.yaml:4: unknown key 'suite'.*nearest valid key is 'suites'",
        ),
        (
            {"check": "node: evaluate\nname: check\nafter: stage0\nsuites: code\n"},
            "check.yaml:4: suites is 'code', expected a list",
        ),
        ({"check": "node: evaluate\nname: check\nafter: stage0\n"}, "either `suites` or a `comm"),
        ({"release": "node: release\nname: release\nformats: {fp4: stage1}\n"}, "names 'fp4'"),
        ({"release": "node: release\nname: stages\nformats: {fp8: stage1}\n"}, "valid: release"),
        ({"release": RELEASE}, "release comes after 'qad', which is no stage"),
        ({"late": stage("late", "after: stage1", "gate: {reference: init}")}, "only gate.drop"),
        (
            {"stage1": stage("stage1", "gate: {reference: check, rise_at_most: {loss: 0.1}}")},
            "stage1.yaml: gate.reference is 'check', which does not come before stage1",
        ),
        (
            {"late": stage("late", "after: init", "gate: {at_most: {loss: 1}, otherwise: branch}")},
            "stage to branch to is named exactly where otherwise is branch",
        ),
        (
            {"late": stage("late", "after: init", "gate: {at_most: {loss: 1}, otherwise: branch,"
                           " branch_to: stage1}")},
            "gate.branch_to is 'stage1', which does not come right after late",
        ),
        ({"start": "node: assemble\nname: start\nlike: stage0\ndecoder: d\nencoder: e\n"},
         "init and start both come after nothing"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_recipe_is_refused(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_graph(write_node_recipe(tmp_path / "recipe", **files))


def test_gates_and_order_change_no_hash_of_what_is_trained(tmp_path: Path) -> None:
    from megatron_vl.config.load import config_hash

    plain = load_graph(write_node_recipe(tmp_path / "a", gate="gate: {at_most: {x: 1}}\n"))
    other = load_graph(
        write_node_recipe(
            tmp_path / "b",
            gate="gate: {at_most: {x: 2}}\n",
            stage1=stage("stage1", "after: stage0", "gate: {at_most: {loss: 3}}"),
        )
    )
    assert config_hash(plain["stage1"].config) == config_hash(other["stage1"].config)


def test_all_gates_of_a_recipe_can_be_made_to_only_record(tmp_path: Path) -> None:
    folder = write_node_recipe(
        tmp_path / "recipe",
        gate="gate: {at_most: {x: 1}}\n",
        stage1=stage("stage1", "after: check", "gate: {at_most: {loss: 3}}"),
    )
    recipe = load_graph(folder, ["gate.otherwise=continue"])
    set_to = {entry.name: gate_of(entry.config).otherwise for entry in recipe.entries}
    assert set_to == {
        "init": "hold", "stage0": "hold", "check": "continue", "stage1": "continue",
    }  # fmt: skip
