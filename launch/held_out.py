"""The tables of held-out losses in a report: stages down, sets, sources or modalities across.

After its last step each stage looks at the held-out set of every stage of the run; read down a
column, a table says what each stage gained and what it cost. A source or modality is read on the
first set, in the order of the run, that holds it, so that a column is the same packs throughout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Lines = Sequence[Mapping[str, Any]]
"""Evaluation lines of `run.metrics.set_lines`."""


@dataclass(frozen=True)
class Table:
    """Losses after each stage.

    columns: of sets, sources or modalities. rows: a stage and its cells; the least loss of a column
    is marked.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list["Cell"]]]


@dataclass(frozen=True)
class Cell:
    """A loss as the page shows it."""

    text: str
    best: bool = False


def held_out_tables(lines_of: Mapping[str, Lines]) -> list[Table]:
    """The tables of a run that has looked at all sets; none of one that has not.

    Args:
        lines_of: the evaluation lines of each stage, in the order of the run.
    """
    losses = {
        stage: {line["eval"]: line for line in lines} for stage, lines in lines_of.items() if lines
    }
    if not losses:
        return []
    sets = [name for name in lines_of if any(name in found for found in losses.values())]
    by_set = {
        stage: {name: float(line["loss"]) for name, line in found.items()}
        for stage, found in losses.items()
    }
    return [
        _table("each stage's set", sets, by_set),
        *(_by_kind(title, key, sets, losses) for title, key in _KINDS.items()),
    ]


_KINDS = {"source": "sources", "modality": "modalities"}


def _by_kind(
    title: str, key: str, sets: list[str], losses: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> Table:
    home: dict[str, str] = {}
    for name in sets:
        for found in losses.values():
            for kind in found.get(name, {}).get(key, {}):
                home.setdefault(kind, name)
    values = {
        stage: {
            kind: float(found[name][key][kind])
            for kind, name in home.items()
            if kind in found.get(name, {}).get(key, {})
        }
        for stage, found in losses.items()
    }
    return _table(title, list(home), values)


def _table(title: str, columns: list[str], values: Mapping[str, Mapping[str, float]]) -> Table:
    least = {
        column: min(row[column] for row in values.values() if column in row) for column in columns
    }
    rows = [
        (
            stage,
            [
                Cell(f"{row[column]:.3f}", row[column] == least[column])
                if column in row
                else Cell("-")
                for column in columns
            ],
        )
        for stage, row in values.items()
    ]
    return Table(title, columns, rows)
