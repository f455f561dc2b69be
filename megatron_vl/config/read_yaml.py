"""Reads a YAML mapping together with the line of every key, and refuses repeated keys.

PyYAML keeps the last of two equal keys and says nothing; in a stage file the first one would be a
setting that is silently ignored.

A file is parsed once, by libyaml where PyYAML has it (ten times faster, and every job of a chain
reads its stage and its site); a file that is not valid is parsed again in Python, whose errors show
the line they mean.
"""

from pathlib import Path
from typing import Any

import yaml

from megatron_vl.config.errors import ConfigError

Loader: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The fastest loader of plain values that is here."""


def read_mapping(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The mapping in a YAML file and the line of each dotted key. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        return _parse(text, path, Loader)
    except yaml.YAMLError:
        pass
    try:
        return _parse(text, path, yaml.SafeLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error


def _parse(
    text: str, path: Path, loader: type[yaml.SafeLoader]
) -> tuple[dict[str, Any], dict[str, int]]:
    parser = loader(text)
    try:
        root = parser.get_single_node()
        if root is None:
            return {}, {}
        if not isinstance(root, yaml.MappingNode):
            raise ConfigError(f"{path}: expected `key: value` lines, found something else")
        lines = _lines(root, path)  # before merging: a `<<` key is a key like any other there
        return parser.construct_document(root), lines
    finally:
        parser.dispose()


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
