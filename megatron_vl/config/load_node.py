"""From a node's file to its checked config; a node is a recipe file with a `node:` key.

Strict as stages are: unknown keys, wrong types and missing keys are refused with file, line and the
nearest valid key. A node's file stands alone (no `base:`). Overrides of a command line are meant
for stages; a node takes those under `gate.` that its schema has too.
"""

from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_vl.config.check_gate import check_gate
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import Field, fields_of, nearest_key
from megatron_vl.config.read_yaml import read_mapping
from megatron_vl.config.schema_node import (
    FORMATS,
    RESERVED,
    SCHEMAS,
    EvaluateNode,
    NodeConfig,
    NodeKind,
    ReleaseNode,
)

_DEFAULT = "default"


def node_kind(path: Path) -> NodeKind | None:
    """The kind of node a recipe file holds; None for a training stage. Raises ConfigError."""
    mapping, lines = read_mapping(path)
    if "node" not in mapping:
        return None
    word = mapping["node"]
    if word not in NodeKind.__members__:
        raise ConfigError(
            f"{path}:{lines['node']}: node is {word!r}, expected one of "
            f"{', '.join(NodeKind.__members__)}; a file without the key is a training stage"
        )
    return NodeKind[word]


def load_node(path: Path | str, overrides: Sequence[str] = ()) -> NodeConfig:
    """Load one node's file. Raises ConfigError."""
    return load_node_with_origins(Path(path), overrides)[0]


def load_node_with_origins(
    path: Path, overrides: Sequence[str] = ()
) -> tuple[NodeConfig, dict[str, str]]:
    """As `load_node`, with the place that set each key: `file:line`, an override, `default`."""
    kind = node_kind(path)
    if kind is None:
        raise ConfigError(f"{path}: has no `node:` key, so it is a training stage and no node")
    fields = fields_of(SCHEMAS[kind])
    values, origins, problems = _read(path, fields)
    for text in overrides:
        key, _, written = text.partition("=")
        if key.strip().startswith("gate.") and key.strip() in fields:
            values[key.strip()] = yaml.safe_load(written)
            origins[key.strip()] = f"override {text!r}"
    merged = OmegaConf.structured(SCHEMAS[kind])
    for key, value in values.items():
        try:
            OmegaConf.update(merged, key, value, merge=False)
        except (OmegaConfBaseException, TypeError, ValueError):
            problems.append(f"{origins[key]}: {key} is {value!r}, expected {fields[key].expected}")
    if problems:
        raise ConfigError(problems)
    missing = sorted(OmegaConf.missing_keys(merged))
    if missing:
        raise ConfigError(f"{path}: these keys must be given a value: {', '.join(missing)}")
    config = OmegaConf.to_object(merged)
    assert is_dataclass(config)
    broken = [f"{path}: {text}" for text in check_node(config)]  # type: ignore[arg-type]
    if broken:
        raise ConfigError(broken)
    leaves = [key for key, field in fields.items() if not field.is_section]
    return config, {key: origins.get(key, _DEFAULT) for key in leaves}  # type: ignore[return-value]


def _read(path: Path, fields: dict[str, Field]) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """The values by dotted key, where each was written, and what is wrong with the keys."""
    mapping, lines = read_mapping(path)
    values: dict[str, Any] = {}
    problems: list[str] = []

    def visit(section: dict, prefix: str) -> None:
        for name, value in section.items():
            key = f"{prefix}{name}"
            where = f"{path}:{lines[key]}"
            if key not in fields:
                nearest = nearest_key(key, fields)
                problems.append(
                    f"{where}: unknown key {key!r} of a node that is {mapping['node']}; the "
                    f"nearest valid key is {nearest!r}"
                )
            elif not fields[key].is_section:
                values[key] = value
            elif isinstance(value, dict):
                visit(value, key + ".")
            elif value is not None:
                problems.append(f"{where}: {key} is {value!r}, expected a section of keys")

    visit(mapping, "")
    return values, {key: f"{path}:{lines[key]}" for key in values}, problems


def check_node(config: NodeConfig) -> list[str]:
    """Every rule a node breaks by itself."""
    if isinstance(config, EvaluateNode):
        return [*_evaluate_rules(config), *check_gate(config.gate)]
    if isinstance(config, ReleaseNode):
        return [*_release_rules(config), *check_gate(config.gate)]
    return []


def _evaluate_rules(config: EvaluateNode) -> list[str]:
    if bool(config.suites) == bool(config.command):
        return ["an evaluation runs either `suites` or a `command`; give one of them"]
    return []


def _release_rules(config: ReleaseNode) -> list[str]:
    problems = []
    if not config.formats:
        problems.append("formats names nothing to release, such as {bf16: stage4}")
    for name in config.formats:
        if name not in FORMATS:
            problems.append(f"formats names {name!r}, expected one of {', '.join(FORMATS)}")
    if config.name in RESERVED or not config.name.isidentifier():
        problems.append(
            f"name is {config.name!r}, which cannot be a folder of the run folder; nearest valid: "
            "release"
        )
    return problems
