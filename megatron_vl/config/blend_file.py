"""Blend files: what a stage draws from, where it comes from, and what of it nobody can have.

    unit: tokens               # what the weights share out: samples (default) or tokens
    when_source_ends: go_on    # or stop: end the data with the first source that ends
    sources:
      ocr: {weight: 2, epochs: 1.5, samples: 1000, url: ..., licence: ..., note: ...}
    missing:
      - {name: ..., samples: ..., tokens: ..., url: ..., licence: ..., note: ...}

`weight` alone is needed. A stage names the file in `data.blend_file`; loading the stage puts its
weights, unit and epochs into the data section, so that a run's config holds them and their hash
covers them. Counts, addresses, licences and notes change nothing of a run and stay in the file.

Refuses, with file and line: unknown and repeated keys, values of the wrong type, weights and epochs
not above 0, a file without sources.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.read_yaml import read_mapping
from megatron_vl.config.schema_data import BlendUnit, SourceEnd

_TOP = ("unit", "when_source_ends", "sources", "missing")
_NUMBERS = ("weight", "epochs", "samples", "tokens")
_TEXTS = ("url", "licence", "note")


@dataclass(frozen=True)
class BlendSource:
    """One source of a blend file.

    weight: its share, relative to the others; 0 for a missing one. epochs: 0 for no end.
    samples, tokens: how large it is said to be; 0 where nobody says.
    """

    name: str
    weight: float = 0.0
    epochs: float = 0.0
    samples: float = 0.0
    tokens: float = 0.0
    url: str = ""
    licence: str = ""
    note: str = ""


@dataclass(frozen=True)
class BlendFile:
    """A blend file.

    missing: parts of the intended mix that cannot be had.
    values: what the file says, by dotted key of a stage; lines: where it says so.
    """

    unit: BlendUnit
    when_source_ends: SourceEnd
    sources: tuple[BlendSource, ...]
    missing: tuple[BlendSource, ...]
    lines: dict[str, int] = field(default_factory=dict)

    @property
    def values(self) -> dict[str, Any]:
        """The data section's keys that the file sets."""
        return {
            "data.blend": {source.name: source.weight for source in self.sources},
            "data.blend_unit": self.unit.name,
            "data.epochs": {source.name: source.epochs for source in self.sources if source.epochs},
            "data.when_source_ends": self.when_source_ends.name,
        }


def read_blend_file(path: Path) -> BlendFile:
    """Read and check a blend file. Raises ConfigError with all its problems."""
    mapping, lines = read_mapping(path)
    problems = list(_problems(mapping, lines, path))
    if problems:
        raise ConfigError(problems)
    return BlendFile(
        unit=BlendUnit[mapping.get("unit", BlendUnit.samples.name)],
        when_source_ends=SourceEnd[mapping.get("when_source_ends", SourceEnd.go_on.name)],
        sources=tuple(
            BlendSource(name=name, **entry) for name, entry in mapping["sources"].items()
        ),
        missing=tuple(BlendSource(**entry) for entry in mapping.get("missing") or ()),
        lines=lines,
    )


def _problems(mapping: dict[str, Any], lines: dict[str, int], path: Path) -> Iterator[str]:
    for key in mapping:
        if key not in _TOP:
            yield _unknown(f"{path}:{lines[key]}", key, _TOP)
    for key, choices in (("unit", BlendUnit), ("when_source_ends", SourceEnd)):
        names = [choice.name for choice in choices]
        if key in mapping and mapping[key] not in names:
            yield (
                f"{path}:{lines[key]}: {key} is {mapping[key]!r}, expected one of "
                f"{', '.join(names)}"
            )
    sources, missing = mapping.get("sources"), mapping.get("missing") or []
    if not isinstance(sources, dict) or not sources:
        yield (
            f"{path}: names no sources, must hold `sources:` with at least one, as in "
            "`captions: {weight: 1}`"
        )
        sources = {}
    for name, entry in sources.items():
        where = f"{path}:{lines[f'sources.{name}']}"
        yield from _entry_problems(str(name), entry, where, (*_NUMBERS, *_TEXTS), "weight")
    if not isinstance(missing, list):
        yield f"{path}:{lines['missing']}: missing is {missing!r}, expected a list"
        missing = []
    for entry in missing:
        where = f"{path}:{lines['missing']}"
        keys = ("name", *_NUMBERS[2:], *_TEXTS)
        yield from _entry_problems("missing", entry, where, keys, "name")


def _entry_problems(
    name: str, entry: Any, where: str, keys: tuple[str, ...], needed: str
) -> Iterator[str]:
    if not isinstance(entry, dict) or needed not in entry:
        yield f"{where}: {name} is {entry!r}, expected a mapping with `{needed}`"
        return
    for key, value in entry.items():
        if key not in keys:
            yield _unknown(where, str(key), keys)
        elif key not in _NUMBERS:
            if not isinstance(value, str):
                yield f"{where}: {name}.{key} is {value!r}, expected text"
        elif isinstance(value, bool) or not isinstance(value, int | float):
            yield f"{where}: {name}.{key} is {value!r}, expected a number"
        elif not 0 < value < math.inf:
            yield f"{where}: {name}.{key} is {value}, must be above 0; or leave it out"


def _unknown(where: str, key: str, keys: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(key, keys, 1, 0.0)[0]
    return f"{where}: unknown key {key!r}; the nearest valid key is {near!r}"
