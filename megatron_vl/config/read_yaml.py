"""Reads a YAML mapping together with the line of every key, and refuses repeated keys.

PyYAML keeps the last of two equal keys and says nothing; in a stage file the first one would be a
setting that is silently ignored.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_vl.config.errors import ConfigError


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line of each dotted key. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found something else")
        lines = _lines(root, path)
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _lines(root: yaml.MappingNode, path: Path) -> dict[str, int]:
    lines: dict[str, int] = {}

    def visit(node: yaml.MappingNode, prefix: str) -> None:
        for name, value in node.value:
            key, line = f"{prefix}{name.value}", name.start_mark.line + 1
            if key in lines:
                raise ConfigError(
                    f"{path}:{line}: {key} is set a second time (first on line {lines[key]})"
                )
            lines[key] = line
            if isinstance(value, yaml.MappingNode):
                visit(value, key + ".")

    visit(root, "")
    return lines
