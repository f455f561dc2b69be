"""What a key means, who reads it, what it is set to and which file said so.

The words come from the schema, the value and its origin from loading the file: nothing here can
drift from what a run does.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vl.config.errors import ConfigError
from megatron_vl.config.fields import Field, fields_of, nearest_key, owner
from megatron_vl.config.load import flatten
from megatron_vl.config.load_node import node_kind
from megatron_vl.config.recipe import load_work_with_origins
from megatron_vl.config.schema_node import SCHEMAS


@dataclass(frozen=True)
class Explanation:
    """Everything there is to say about one key of one stage file."""

    key: str
    sentence: str
    unit: str
    reader: str
    expected: str
    value: Any
    """The resolved value; for a section, its values by dotted key."""
    origin: str
    """`file:line`, an override, or `default`; empty for a section."""

    def text(self) -> str:
        """The explanation as lines for a terminal."""
        lines = [self.key, f"  {self.sentence}", f"  unit      {self.unit}"]
        lines += [f"  read by   {self.reader}", f"  takes     {self.expected}"]
        if self.origin:
            lines += [f"  value     {self.value}", f"  set by    {self.origin}"]
        else:
            lines += [f"  {key} = {value}" for key, value in self.value.items()]
        return "\n".join(lines)


def explain(path: Path, key: str, overrides: Sequence[str] = ()) -> Explanation:
    """Explain one key of a stage's or node's file.

    Raises ConfigError for an unknown key or a broken file.
    """
    kind = node_kind(path)
    field = owner(key) if kind is None else fields_of(SCHEMAS[kind]).get(key)
    if field is None:
        nearest = nearest_key(key, None if kind is None else fields_of(SCHEMAS[kind]))
        raise ConfigError(f"unknown key {key!r}; the nearest valid key is {nearest!r}")
    config, origins = load_work_with_origins(path, overrides)
    values = flatten(config)
    if field.is_section:
        inside = {name: value for name, value in values.items() if name.startswith(key + ".")}
        return _explanation(field, inside, "")
    return _explanation(field, values[field.key], origins[field.key])


def _explanation(field: Field, value: Any, origin: str) -> Explanation:
    return Explanation(
        field.key, field.sentence, field.unit, field.reader, field.expected, value, origin
    )
