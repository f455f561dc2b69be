"""`mvl config`: look at stage files without running anything."""

import json
from argparse import Namespace
from pathlib import Path

from launch import exit_codes
from megatron_vl.config.explain import explain
from megatron_vl.config.fields import all_fields
from megatron_vl.config.load import differences, load_stage, load_with_origins, to_plain, to_yaml


def show(args: Namespace) -> int:
    """Print the resolved stage; --origins adds which file set each key."""
    config, origins = load_with_origins(Path(args.file), args.overrides)
    if args.json:
        print(json.dumps(to_plain(config), indent=2))
    elif args.origins:
        from megatron_vl.config.load import flatten

        for key, value in flatten(config).items():
            print(f"{key} = {value}    # {origins[key]}")
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
        print(f"{key}: {old} -> {new}")
    if not changed:
        print("no difference")
    return exit_codes.OK


def schema(args: Namespace) -> int:
    """Print every key with its meaning, unit and reader."""
    for key, field in all_fields().items():
        print(f"{key}\n    {field.sentence} [{field.unit}; {field.reader}]")
    return exit_codes.OK
