"""`mvl config`: look at stage files without running anything."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from launch import exit_codes
from launch.site import site_fields
from megatron_vl.config.explain import explain
from megatron_vl.config.fields import all_fields, fields_of
from megatron_vl.config.json_schema import json_schema
from megatron_vl.config.load import (
    DEFAULT_ORIGIN,
    differences,
    flatten,
    to_plain,
    to_yaml,
)
from megatron_vl.config.recipe import load_work_with_origins
from megatron_vl.config.schema_node import SCHEMAS, NodeKind
from megatron_vl.config.sizes import SIZE_KEYS

_ORIGIN_COLUMN = 72


def written(value: Any) -> str:
    """A value as a stage file would hold it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def show(args: Namespace) -> int:
    """Print the resolved stage; --origins adds which file set each key."""
    config, origins = load_work_with_origins(Path(args.file), args.overrides)
    if args.json:
        print(json.dumps(to_plain(config), indent=2))
    elif args.origins:
        lines = [f"{key} = {written(value)}" for key, value in flatten(config).items()]
        width = min(max(map(len, lines)), _ORIGIN_COLUMN)
        for line, origin in zip(lines, (origins[key] for key in flatten(config)), strict=True):
            print(f"{line:{width}}  # {origin}")
    else:
        print(to_yaml(config), end="")
    return exit_codes.OK


def explain_key(args: Namespace) -> int:
    """Print what a key means, its value and who set it."""
    print(explain(Path(args.file), args.key, args.overrides).text())
    return exit_codes.OK


def diff(args: Namespace) -> int:
    """Print the keys in which two stages differ: both values, and whether each is set there."""
    (one, here), (two, there) = (load_work_with_origins(Path(file)) for file in (args.a, args.b))
    changed = differences(one, two)
    if args.but_sizes:
        changed = {key: values for key, values in changed.items() if key not in SIZE_KEYS}
    if args.json:
        rows = [
            {"key": key, "a": old, "b": new, "set_by": [here.get(key), there.get(key)]}
            for key, (old, new) in changed.items()
        ]
        print(json.dumps(rows))
        return exit_codes.OK
    for key, (old, new) in changed.items():
        old, new = _changed_entries(old, new)
        print(f"{key}: {written(old)} -> {written(new)}")
        print(f"    {_set_by(here.get(key), args.a)} -> {_set_by(there.get(key), args.b)}")
    if not changed:
        print("no difference")
    return exit_codes.OK


def _changed_entries(old: Any, new: Any) -> tuple[Any, Any]:
    """Of two mappings what differs; other values as they are."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return old, new
    same = {key for key in old if key in new and old[key] == new[key]}
    first, second = (
        {key: value for key, value in values.items() if key not in same} for values in (old, new)
    )
    return first, second


def _set_by(origin: str | None, file: str) -> str:
    """Whether a file sets a value itself or inherits it, and where."""
    if origin is None:
        return "no key of its kind"
    if origin.startswith(f"{file}:"):
        return f"set in line {origin.removeprefix(f'{file}:')}"
    return origin if origin.startswith(DEFAULT_ORIGIN) else f"inherited from {origin}"


def schema(args: Namespace) -> int:
    """Print every key of a stage, node or site file with what it means, or as a JSON schema."""
    fields = site_fields() if args.site else all_fields()
    if args.node:
        fields = fields_of(SCHEMAS[NodeKind[args.node]])
    if args.json:
        extra = {} if args.site or args.node else {"base": "A file that this one builds on."}
        print(json.dumps(json_schema(fields, extra), indent=2))
        return exit_codes.OK
    for key, field in fields.items():
        print(f"{key}\n    {field.sentence} [{field.unit}; {field.reader}]")
    return exit_codes.OK
