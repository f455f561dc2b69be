"""`mvl config`: look at stage files without running anything."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import yaml

from launch import exit_codes
from launch.site import site_fields
from megatron_vl.config.explain import explain
from megatron_vl.config.fields import all_fields
from megatron_vl.config.load import (
    differences,
    flatten,
    load_stage,
    load_with_origins,
    to_plain,
    to_yaml,
)

_ORIGIN_COLUMN = 72


def written(value: Any) -> str:
    """A value as a stage file would hold it, on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6)
    return text.removesuffix("...\n").strip()


def show(args: Namespace) -> int:
    """Print the resolved stage; --origins adds which file set each key."""
    config, origins = load_with_origins(Path(args.file), args.overrides)
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
    """Print the keys in which two stages differ."""
    changed = differences(load_stage(args.a), load_stage(args.b))
    for key, (old, new) in changed.items():
        print(f"{key}: {written(old)} -> {written(new)}")
    if not changed:
        print("no difference")
    return exit_codes.OK


def schema(args: Namespace) -> int:
    """Print every key of a stage file, or with --site of a site file, with what it means."""
    for key, field in (site_fields() if args.site else all_fields()).items():
        print(f"{key}\n    {field.sentence} [{field.unit}; {field.reader}]")
    return exit_codes.OK
