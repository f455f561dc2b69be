"""From stage files to a resolved, checked `StageConfig`.

A stage file is YAML; `base:` names a file it builds on, relative to itself, and that file may name
another. Files are applied from the root of that chain to the stage, then `key=value` overrides, and
the last word wins. A list or mapping value (`train.trainable`, `data.blend`) is replaced as a
whole, never merged: what a stage file says is all there is. `data.blend_file` names a file whose
blend is put in its place (`blend_file.py`); steps may follow from tokens, and keys that a later
layer switches off go back to their defaults (`settle.py`).

Refuses, naming file, line, key and the nearest valid value: unknown and repeated keys, values of
the wrong type, missing mandatory keys, a circle of bases, `${...}` interpolation (a resolved file
must mean the same everywhere), and whatever `check.py` refuses. All problems come in one error.
"""

import enum
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vl.config.blend_file import read_blend_file
from megatron_vl.config.check import check_stage
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import leaf_fields, nearest_key, owner
from megatron_vl.config.read_yaml import read_mapping
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_node import Work
from megatron_vl.config.settle import settle_length, switch_off

DEFAULT_ORIGIN = "default"
_FOLLOWING = ("after", "gate")
_WITH_BLEND: dict[str, Any] = {"data.blend_unit": "samples", "data.epochs": {}}
"""What a blend set as a whole puts back, unless it is set beside it."""


@dataclass(frozen=True)
class Layer:
    """The values one file or override sets, by dotted key, and where each was written."""

    values: dict[str, Any]
    origins: dict[str, str]


def load_stage(path: Path | str, overrides: Sequence[str] = ()) -> StageConfig:
    """Load one stage file with its bases and overrides. Raises ConfigError."""
    return load_with_origins(Path(path), overrides)[0]


def load_with_origins(
    path: Path, overrides: Sequence[str] = ()
) -> tuple[StageConfig, dict[str, str]]:
    """As `load_stage`, with the place that set each key: `file:line`, an override, or `default`."""
    layers, problems = _file_layers(path)
    num_files = len(layers)
    for text in overrides:
        layer, found = _override_layer(text)
        layers.append(layer)
        problems += found
    merged = OmegaConf.structured(StageConfig)
    origins = dict.fromkeys(leaf_fields(), DEFAULT_ORIGIN)
    last: dict[str, int] = {}
    for number, layer in enumerate(layers):
        for key, value in layer.values.items():
            problem = _set(merged, key, value, layer.origins[key])
            if problem:
                problems.append(problem)
            origins[key] = layer.origins[key]
            last[key] = number
    if problems:
        raise ConfigError(problems)
    settle_length(merged, last, origins)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{path}: these keys must be given a value: {', '.join(missing)}")
    config = OmegaConf.to_object(merged)
    assert isinstance(config, StageConfig)
    # The overrides of one command line are one layer: their order does not make a key unread.
    switch_off(config, {key: min(at, num_files) for key, at in last.items()}, origins)
    broken = check_stage(config)
    if broken:
        raise ConfigError([f"{path}: {text}" for text in broken])
    return config, origins


def to_plain(config: Work) -> dict[str, Any]:
    """The config as nested dicts of YAML and JSON values; enums become their names."""
    return _plain(asdict(config))


def to_yaml(config: Work) -> str:
    """The resolved config as YAML: a stage file without a base that loads to an equal config."""
    return yaml.safe_dump(to_plain(config), sort_keys=False, allow_unicode=True, width=100)


def config_hash(config: Work) -> str:
    """Twelve hex digits that change when any value does that says what is trained.

    `after` and `gate` say what follows what: they can change without training a stage anew.
    """
    trained = {key: value for key, value in to_plain(config).items() if key not in _FOLLOWING}
    canonical = json.dumps(trained, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def flatten(config: Work) -> dict[str, Any]:
    """The config's values by dotted key, in the order of the schema; enums become their names."""
    plain = to_plain(config)
    kind: type = type(config)
    return {key: _dig(plain, key) for key in leaf_fields(kind)}


def differences(old: Work, new: Work) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with both values; None for a key that one does not have."""
    before, after = flatten(old), flatten(new)
    pairs = {key: (before.get(key), after.get(key)) for key in {**before, **after}}
    return {key: (one, two) for key, (one, two) in pairs.items() if one != two}


def _file_layers(path: Path) -> tuple[list[Layer], list[str]]:
    """The layers of a file and its bases, the root of the chain first."""
    layers: list[Layer] = []
    problems: list[str] = []
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in [other.resolve() for other in seen]:
            circle = " -> ".join(str(other) for other in [*seen, current])
            raise ConfigError(f"{path}: `base:` goes round in a circle: {circle}")
        seen.append(current)
        mapping, lines = read_mapping(current)
        base = mapping.pop("base", None)
        if base is not None and not isinstance(base, str):
            raise ConfigError(f"{current}: base is {base!r}, expected the name of a file")
        layer, found = _layer(mapping, lines, current)
        found += _put_blend(layer, current.parent)
        layers.insert(0, layer)
        problems += found
        current = None if base is None else Path(os.path.normpath(current.parent / base))
        if current is not None and not current.is_file():
            raise ConfigError(f"{seen[-1]}: base {base!r} does not exist ({current})")
    return layers, problems


def _layer(mapping: dict, lines: dict[str, int], path: Path) -> tuple[Layer, list[str]]:
    layer = Layer({}, {})
    problems: list[str] = []

    def visit(section: dict, prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            origin = f"{path}:{lines[key]}"
            field = owner(key)
            if field is None:
                problems.append(_unknown(key, origin))
            elif field.is_section:
                if isinstance(value, dict):
                    visit(value, key + ".")
                elif value is not None:
                    problems.append(_wrong_type(key, value, origin))
            else:
                layer.values[key] = value
                layer.origins[key] = origin

    visit(mapping, "")
    return layer, problems


def _override_layer(text: str) -> tuple[Layer, list[str]]:
    """The layer of one `key=value` argument; the value is YAML."""
    key, equals, written = text.partition("=")
    key, origin = key.strip(), f"override {text!r}"
    nothing = Layer({}, {})
    if not equals or not key:
        return nothing, [f"{origin}: expected key=value, such as optimizer.lr=1e-4"]
    field = owner(key)
    if field is None:
        return nothing, [_unknown(key, origin)]
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        return nothing, [f"{origin}: {written!r} is not a YAML value, expected {field.expected}"]
    if field.is_section:
        return nothing, [f"{origin}: {key} is a section; set its keys: {key}.KEY=value"]
    layer = Layer({key: value}, {key: origin})
    return layer, _put_blend(layer, Path())


def _put_blend(layer: Layer, folder: Path) -> list[str]:
    """Put the blend of a layer's blend file in its place; returns problems.

    A blend given as a whole takes its unit and epochs along: those of an earlier layer belong to
    other sources.
    """
    if layer.values.get("data.blend_file"):
        origin = layer.origins["data.blend_file"]
        if "data.blend" in layer.values:
            return [f"{origin}: data.blend_file and data.blend are both set; keep one of them"]
        name = layer.values.pop("data.blend_file")
        if not isinstance(name, str):
            return [_wrong_type("data.blend_file", name, origin)]
        path = Path(os.path.normpath(folder / name))
        if not path.is_file():
            return [f"{origin}: data.blend_file {name!r} does not exist ({path})"]
        try:
            blend = read_blend_file(path)
        except ConfigError as error:
            return error.problems
        layer.values.update(blend.values)
        layer.origins.update(dict.fromkeys(blend.values, f"{path}:{blend.lines['sources']}"))
    elif "data.blend" in layer.values:
        for key, value in _WITH_BLEND.items():
            layer.values.setdefault(key, value)
            layer.origins.setdefault(key, layer.origins["data.blend"])
    return []


def _set(merged: Any, key: str, value: Any, origin: str) -> str | None:
    """Set one key; returns the problem when its type forbids the value."""
    if "${" in str(value):
        return f"{origin}: {key} holds {value!r}; `${{...}}` is not supported, write the value"
    try:
        OmegaConf.update(merged, key, value, merge=False)
    except (OmegaConfBaseException, TypeError, ValueError):
        return _wrong_type(key, value, origin)
    return None


def _unknown(key: str, origin: str) -> str:
    return f"{origin}: unknown key {key!r}; the nearest valid key is {nearest_key(key)!r}"


def _wrong_type(key: str, value: Any, origin: str) -> str:
    field = owner(key)
    assert field is not None
    expected = field.expected if field.key == key else "a number"
    return f"{origin}: {key} is {value!r}, expected {expected}"


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def _dig(plain: dict[str, Any], key: str) -> Any:
    value: Any = plain
    for name in key.split("."):
        value = value[name]
    return value
