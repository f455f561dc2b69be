"""The graph of a recipe: order, parents, what is left out, and what is refused by name."""

import random

import pytest

from megatron_vl.config.errors import ConfigError
from megatron_vl.run.graph import Graph, make_graph


def test_files_that_say_nothing_form_a_chain_and_others_hang_from_it() -> None:
    graph = make_graph(
        {
            "init": None,
            "qad": ["stage4"],
            "release": ["stage4", "qad"],
            "stage0": None,
            "stage3": None,
            "check": ["stage3"],
            "stage4": ["check"],
        }
    )
    assert dict(graph.parents) == {
        "init": (),
        "stage0": ("init",),
        "stage3": ("stage0",),
        "check": ("stage3",),
        "stage4": ("check",),
        "qad": ("stage4",),
        "release": ("stage4", "qad"),
    }
    assert graph.names[-3:] == ["stage4", "qad", "release"]
    assert graph.ancestors("qad") == ["init", "stage0", "stage3", "check", "stage4"]
    assert graph.descendants("check") == ["stage4", "qad", "release"]
    assert graph.children("stage4") == ["qad", "release"]


def test_the_chain_goes_on_before_branches_do() -> None:
    graph = make_graph({"init": None, "a": ["init"], "stage0": None, "stage1": None})
    assert graph.names == ["init", "stage0", "stage1", "a"]


def test_what_is_left_out_is_bridged_to_the_grandparents() -> None:
    graph = make_graph({"a": None, "b": None, "c": None, "d": ["b", "c"], "e": ["d"]})
    assert dict(graph.without(["c"]).parents) == {
        "a": (), "b": ("a",), "d": ("b",), "e": ("d",),
    }  # fmt: skip
    assert graph.without(["b", "c", "d"]).parents["e"] == ("a",)
    assert graph.without(["a"]).parents["b"] == ()


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            {"init": None, "stage1": ["stage01"]},
            "stage1 comes after 'stage01'.*nearest is 'stage1'",
        ),
        (
            {"init": None, "b": ["c"], "c": ["d"], "d": ["b"]},
            "wait for each other: b -> c -> d -> b",
        ),
        ({"init": None, "a": ["a"]}, "wait for each other: a -> a"),
        ({"init": [], "stage0": None, "other": []}, "init and other both come after nothing"),
    ],
)
def test_what_is_no_graph_is_refused_by_name(after: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_graph(after)


def test_random_graphs_against_a_walk_of_every_path() -> None:
    """Order, ancestors, descendants and bridging, by following edges one at a time."""
    chance = random.Random(5)
    for _ in range(40):
        size = chance.randint(2, 9)
        names = [f"n{i}" for i in range(size)]
        edges = {
            name: [] if not i else sorted(chance.sample(names[:i], chance.randint(1, min(i, 3))))
            for i, name in enumerate(names)
        }
        listed = chance.sample(names, size)
        graph = make_graph({name: edges[name] for name in listed})
        assert all(graph.names.index(p) < graph.names.index(n) for n in names for p in edges[n])

        def reach(name: str, edges: dict[str, list[str]] = edges) -> set[str]:
            return set(edges[name]).union(*(reach(parent) for parent in edges[name]))

        for name in names:
            assert set(graph.ancestors(name)) == reach(name)
            assert set(graph.descendants(name)) == {n for n in names if name in reach(n)}
        gone = set(chance.sample(names, size // 2))
        left: Graph = graph.without(gone)
        for name in set(names) - gone:
            stack, found = list(edges[name]), set()
            while stack:
                parent = stack.pop()
                if parent in gone:
                    stack += edges[parent]
                else:
                    found.add(parent)
            assert set(left.parents[name]) == found
