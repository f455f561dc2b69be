"""Results of evaluation tools as one flat object, {"suite.metric": number}; needs no torch.

    flat         that form itself
    vlmevalkit   MODEL_DATASET_acc.csv, _score.csv, _score.json, _rating.json in its output folder
    lmms_eval    ..._results.json: {"results": {task: {"metric,filter": number}}}
    nemo_skills  metrics.json: {benchmark: {aggregation: {metric: number}}}

A suite is the tool's dataset, task or benchmark; parts of a metric's name are joined by dots, white
space becomes an underscore. Numbers stay as the tool wrote them (NeMo-Skills and VLMEvalKit write
percent, lmms-eval mostly fractions). Standard errors, counts' aliases and texts are left out.

Refuses a file that is none of these, a folder without one, a name that comes twice with different
numbers, and numbers that are not finite.
"""

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

READERS = ("flat", "vlmevalkit", "lmms_eval", "nemo_skills")

_VLMEVALKIT_ENDS = ("_acc.csv", "_score.csv", "_score.json", "_acc.json", "_rating.json")
_PATTERNS = {
    "vlmevalkit": [f"*{end}" for end in _VLMEVALKIT_ENDS],
    "lmms_eval": ["*results.json"],
    "nemo_skills": ["metrics.json"],
    "flat": ["*.json"],
}
_MOST_FILES = 10_000


class ResultError(ValueError):
    """A result file that cannot be read; the message names it."""


def read_results(path: Path, reader: str | None = None) -> dict[str, float]:
    """The metrics of a result file, or of a folder of them.

    Args:
        reader: a name of `READERS`; told from the names and contents where None.

    Raises:
        ResultError: see the module.
    """
    if path.is_dir():
        kind, files = _find(path, reader)
    elif path.is_file():
        kind, files = reader or _kind_of(path), [path]
    else:
        raise ResultError(f"{path}: there is no such file or folder of results")
    found: dict[str, float] = {}
    for file in files:
        metrics = dict(_READ[kind](file))
        if not metrics:
            raise ResultError(f"{file} holds no number that {kind} writes")
        found = merge(found, metrics, str(file))
    return found


def merge(known: Mapping[str, float], more: Mapping[str, float], where: str) -> dict[str, float]:
    """Both together.

    Raises:
        ResultError: they disagree about a metric.
    """
    for name, value in more.items():
        if known.get(name, value) != value:
            raise ResultError(
                f"{where} says {name} is {value}, before it was {known[name]}; read results of one "
                "evaluation at a time"
            )
    return {**known, **more}


def _find(folder: Path, reader: str | None) -> tuple[str, list[Path]]:
    kinds = [reader] if reader else [kind for kind in _PATTERNS if kind != "flat"]
    for kind in kinds:
        files = sorted({file for glob in _PATTERNS[kind] for file in folder.rglob(glob)})
        if len(files) > _MOST_FILES:
            raise ResultError(f"{folder} holds {len(files)} result files; name one of its folders")
        if files:
            return kind, files
    wanted = ", ".join(glob for kind in kinds for glob in _PATTERNS[kind])
    raise ResultError(f"{folder} holds no results: none of {wanted}")


def _kind_of(path: Path) -> str:
    if path.name.endswith(_VLMEVALKIT_ENDS):
        return "vlmevalkit"
    value = _json(path)
    if isinstance(value.get("results"), dict):
        return "lmms_eval"
    if all(isinstance(entry, dict) for entry in value.values()):
        return "nemo_skills"
    return "flat"


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultError(f"{path} cannot be read as JSON ({error})") from error
    if not isinstance(value, dict):
        raise ResultError(f"{path} holds no JSON object")
    return value


def _number(value: Any, name: str, path: Path) -> float | None:
    """A number, or text that is one; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except ValueError:
        return None
    if not math.isfinite(number):
        raise ResultError(f"{path}: {name} is {value}, which is no finite number")
    return number


def _name(*parts: str) -> str:
    return ".".join("_".join(part.split()) for part in parts)


def _flat(path: Path) -> Iterator[tuple[str, float]]:
    for name, value in _json(path).items():
        number = None if isinstance(value, str) else _number(value, name, path)
        if number is None:
            raise ResultError(f"{path}: {name} is {value!r}; a flat file holds numbers alone")
        yield name, number


def _nested(value: Any, path: Path, *parts: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _nested(inner, path, *parts, str(key))
        return
    number = _number(value, _name(*parts), path)
    if number is not None:
        yield _name(*parts), number


def _vlmevalkit(path: Path) -> Iterator[tuple[str, float]]:
    stem = next(path.name.removesuffix(e) for e in _VLMEVALKIT_ENDS if path.name.endswith(e))
    models = [parent.name + "_" for parent in path.parents if parent.name]
    dataset = next((stem.removeprefix(m) for m in models if stem.startswith(m)), stem)
    if path.suffix == ".json":
        yield from _nested(_json(path), path, dataset)
        return
    rows = list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8"))))
    for row in rows:
        # Files of one split have one row, and its label says nothing.
        texts = [text for text in row.values() if text and _number(text, "", path) is None]
        label = texts[:1] if len(rows) > 1 else []
        for column, text in row.items():
            number = _number(text, f"{dataset}.{column}", path)
            if column and number is not None:
                yield _name(dataset, *label, column), number


def _lmms_eval(path: Path) -> Iterator[tuple[str, float]]:
    for task, entries in _json(path).get("results", {}).items():
        for key, value in entries.items():
            metric, _, chosen = key.partition(",")
            if metric == "alias" or metric.endswith("_stderr"):
                continue
            shown = metric if chosen in ("", "none") else f"{metric}@{chosen}"
            yield from _nested(value, path, task, shown)


def _nemo_skills(path: Path) -> Iterator[tuple[str, float]]:
    yield from _nested(_json(path), path)


_READ: Mapping[str, Callable[[Path], Iterator[tuple[str, float]]]] = {
    "flat": _flat,
    "vlmevalkit": _vlmevalkit,
    "lmms_eval": _lmms_eval,
    "nemo_skills": _nemo_skills,
}
