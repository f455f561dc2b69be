"""The schema as data: every dotted key with its type, its default, its meaning and its reader.

`schema.py` says everything once, as dataclasses with a docstring under each field. This module
reads the types from the classes and the docstrings from the source, and offers both by dotted key
(`optimizer.lr`), which is how users name keys everywhere.

Refuses: a field without a docstring in the form `Sentence. [unit; reader]`.
"""

import ast
import dataclasses
import difflib
import enum
import functools
import inspect
import re
import sys
import types
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from megatron_vl.config import schema

_DOC = re.compile(r"(?P<sentence>.+?)\s*\[(?P<unit>[^;\]]+);\s*(?P<reader>[^\]]+)\]", re.DOTALL)


@dataclass(frozen=True)
class Field:
    """One key of the schema."""

    key: str
    type: Any
    default: Any
    """The default value; MISSING ("???") when a stage file must give one, None for a section."""
    sentence: str
    unit: str
    reader: str

    @property
    def is_section(self) -> bool:
        """Whether the key holds further keys of the schema rather than a value."""
        return dataclasses.is_dataclass(self.type)

    @property
    def is_mapping(self) -> bool:
        """Whether the key holds names that the user chooses (`data.blend`)."""
        return get_origin(self.type) is dict

    @property
    def expected(self) -> str:
        """What a value of this key looks like, in words."""
        return describe_type(self.type)


def describe_type(kind: Any) -> str:
    """The values a type takes, in words for a message."""
    if dataclasses.is_dataclass(kind):
        return "a section of keys"
    if get_origin(kind) is list:
        return f"a list, each {describe_type(get_args(kind)[0])}"
    if get_origin(kind) is dict:
        return f"a mapping from names to values, each {describe_type(get_args(kind)[1])}"
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "one of " + ", ".join(member.name for member in kind)
    return {int: "an integer", float: "a number", bool: "true or false", str: "text"}[kind]


@functools.cache
def all_fields() -> dict[str, Field]:
    """Every key of a stage file, sections included, in the order of the schema."""
    return fields_of(schema.StageConfig)


def fields_of(root: type) -> dict[str, Field]:
    """Every key under a dataclass, sections included; their modules document each field."""
    return {field.key: field for field in _walk(root, "")}


@functools.cache
def leaf_fields(root: type = schema.StageConfig) -> dict[str, Field]:
    """The keys that hold values: of a stage file, or of another kind of file."""
    return {key: field for key, field in fields_of(root).items() if not field.is_section}


def owner(key: str) -> Field | None:
    """The field a dotted key belongs to: itself, or the mapping it names an entry of, or None."""
    fields = all_fields()
    if key in fields:
        return fields[key]
    parent = key.rpartition(".")[0]
    if parent in fields and fields[parent].is_mapping:
        return fields[parent]
    return None


def nearest_key(key: str, valid: Collection[str] | None = None) -> str:
    """The valid dotted key that resembles `key` most; a match of the last word counts most.

    A short name also resembles the words it stands for: `learning_rate` is nearest to `lr`.
    `valid` are the keys to choose from; a stage file's when None.
    """
    valid = all_fields() if valid is None else valid
    last = key.rpartition(".")[2]
    initials = "".join(word[:1] for word in last.split("_"))

    def resemblance(candidate: str) -> float:
        name = candidate.rpartition(".")[2]
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        word = difflib.SequenceMatcher(None, last, name).ratio()
        return whole + max(word, float(name == initials))

    return max(valid, key=resemblance)


def _walk(cls: type, prefix: str) -> list[Field]:
    found = []
    docs = _docstrings(sys.modules[cls.__module__])
    hints = get_type_hints(cls)
    for item in dataclasses.fields(cls):
        text = docs.get((cls.__name__, item.name), "")
        match = _DOC.fullmatch(" ".join(text.split()))
        if match is None:
            raise ValueError(
                f"{cls.__module__}.{cls.__name__}.{item.name} needs a docstring "
                f"`Sentence. [unit; reader]` under it, found {text!r}"
            )
        kind = hints[item.name]
        key = prefix + item.name
        section = dataclasses.is_dataclass(kind)
        found.append(Field(key, kind, None if section else _default(item), **match.groupdict()))
        if section:
            found += _walk(kind, key + ".")
    return found


def _default(item: dataclasses.Field) -> Any:
    if item.default_factory is not dataclasses.MISSING:
        return item.default_factory()
    return MISSING if item.default is dataclasses.MISSING else item.default


@functools.cache
def _docstrings(module: types.ModuleType) -> dict[tuple[str, str], str]:
    """The string under each annotated assignment of each class of a module."""
    found = {}
    for cls in ast.parse(inspect.getsource(module)).body:
        if not isinstance(cls, ast.ClassDef):
            continue
        for line, following in zip(cls.body, [*cls.body[1:], None], strict=True):
            if not isinstance(line, ast.AnnAssign) or not isinstance(line.target, ast.Name):
                continue
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                found[cls.name, line.target.id] = str(following.value.value)
    return found
