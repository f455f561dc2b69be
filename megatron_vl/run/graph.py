"""Which stage of a recipe or run follows which: a graph with one head, as names alone.

What: every stage or node with the ones it waits for, in an order in which all can run. The first it
waits for is its parent, whose checkpoint it takes. Why `after:` keys in the stage files and no list
beside them: a file then says all there is about its stage, a recipe without the keys is a chain by
name as before, and nothing can name a stage twice or forget one. What it refuses, by name: parents
that do not exist, circles, more than one head. What it costs: nothing worth counting.
"""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from megatron_vl.config.errors import ConfigError


@dataclass(frozen=True)
class Graph:
    """Stages by name, each with those it waits for; parents come before children."""

    parents: Mapping[str, tuple[str, ...]]

    @property
    def names(self) -> list[str]:
        """Every stage, in an order in which they can run one after another."""
        return list(self.parents)

    def children(self, name: str) -> list[str]:
        """Those that wait for a stage."""
        return [child for child, parents in self.parents.items() if name in parents]

    def ancestors(self, name: str) -> list[str]:
        """All that must come before a stage, in order."""
        found: set[str] = set()
        for other in reversed(self.names):
            if other == name or other in found:
                found.update(self.parents[other])
        return [other for other in self.names if other in found]

    def descendants(self, name: str) -> list[str]:
        """All that can only come after a stage, in order."""
        found: list[str] = []
        for other, parents in self.parents.items():
            if any(parent == name or parent in found for parent in parents):
                found.append(other)
        return found

    def without(self, skipped: Iterable[str]) -> "Graph":
        """The graph with some stages left out; their children follow their parents instead."""
        gone = set(skipped)
        kept: dict[str, tuple[str, ...]] = {}
        shown: dict[str, tuple[str, ...]] = {}
        for name, parents in self.parents.items():
            through = [end for parent in parents for end in shown.get(parent, (parent,))]
            merged = tuple(dict.fromkeys(through))
            if name in gone:
                shown[name] = merged
            else:
                kept[name] = merged
        return Graph(kept)


def make_graph(after: Mapping[str, Sequence[str] | None]) -> Graph:
    """The graph of a recipe.

    Args:
        after: by name, in the recipe's order, what each stage waits for, its parent first; None for
            "the one before it", which counts only stages that do not say either. () is a head.

    Raises:
        ConfigError: a parent is missing, some stages wait for each other, or there are two heads.
    """
    wanted: dict[str, tuple[str, ...]] = {}
    before: str | None = None
    for name, parents in after.items():
        if parents is None:
            wanted[name] = () if before is None else (before,)
            before = name
        else:
            wanted[name] = tuple(dict.fromkeys(parents))
            before = name if not parents and before is None else before
    problems = _missing(wanted)
    if problems:
        raise ConfigError(problems)
    return Graph({name: wanted[name] for name in _order(wanted, after)})


def _missing(wanted: Mapping[str, tuple[str, ...]]) -> list[str]:
    problems = []
    for name, parents in wanted.items():
        for parent in parents:
            if parent not in wanted:
                nearest = difflib.get_close_matches(parent, wanted, n=1, cutoff=0.0)
                problems.append(
                    f"{name} comes after {parent!r}, which is no stage of the recipe; the nearest "
                    f"is {nearest[0]!r}; there are {', '.join(wanted)}"
                )
    heads = [name for name, parents in wanted.items() if not parents]
    if len(heads) > 1:
        problems.append(
            f"{' and '.join(heads)} both come after nothing; a recipe has one head: give "
            f"{heads[-1]} an `after:`"
        )
    return problems


def _order(
    wanted: Mapping[str, tuple[str, ...]], after: Mapping[str, Sequence[str] | None]
) -> list[str]:
    """Parents first; of those that could come next, the chain goes on before branches do."""
    ranked = sorted(wanted, key=lambda name: after[name] is not None)
    done: list[str] = []
    while len(done) < len(wanted):
        ready = [n for n in ranked if n not in done and all(p in done for p in wanted[n])]
        if not ready:
            circle = _circle(wanted, [name for name in wanted if name not in done])
            raise ConfigError(f"these stages wait for each other: {' -> '.join(circle)}")
        done.append(ready[0])
    return done


def _circle(wanted: Mapping[str, tuple[str, ...]], left: list[str]) -> list[str]:
    """One circle among the stages that can never start, each after the one it is shown before."""
    path = [left[0]]
    while True:
        path.append(next(parent for parent in wanted[path[-1]] if parent in left))
        if path[-1] in path[:-1]:
            return path[path.index(path[-1]) :]
