"""The schema of a stage, node or site file as JSON Schema, which editors check and complete by.

YAML language servers take it from a comment in the file's first line or from a setting. It says
types, choices and texts; the rules between keys are `config.check`'s alone.
"""

import dataclasses
import enum
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from omegaconf import MISSING

from megatron_vl.config.fields import Field

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema(fields: Mapping[str, Field], extra: Mapping[str, str]) -> dict[str, Any]:
    """One object with all keys and no others.

    Args:
        fields: by dotted key, sections before what they hold.
        extra: keys with text values that are no fields, with what they mean.
    """
    root = _object()
    for key, text in extra.items():
        root["properties"][key] = {"type": "string", "description": text}
    sections = {"": root}
    for key, field in fields.items():
        section, _, name = key.rpartition(".")
        described = _object() if field.is_section else _type(field.type)
        described["description"] = f"{field.sentence} [{field.unit}; {field.reader}]"
        default = _plain(field.default)
        if not field.is_section and default != MISSING:
            described["default"] = default
        sections[section]["properties"][name] = described
        if field.is_section:
            sections[key] = described
    return {"$schema": DIALECT, **root}


def _object() -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": {}}


def _type(kind: Any) -> dict[str, Any]:
    """A Python type of the schema as JSON Schema."""
    if get_origin(kind) is list:
        return {"type": "array", "items": _type(get_args(kind)[0])}
    if get_origin(kind) is dict:
        return {"type": "object", "additionalProperties": _type(get_args(kind)[1])}
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return {"enum": [member.name for member in kind]}
    assert not dataclasses.is_dataclass(kind), kind
    return {"type": {int: "integer", float: "number", bool: "boolean", str: "string"}[kind]}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value
