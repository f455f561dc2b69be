"""What a release's certificates say to its node: which checks failed, and what a person does next.

Reads the certificates on disk alone; costs nothing.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from checkpoint_tools.certificate.check import CERTIFICATE_FILE, PAGE_FILE, Bounds
from launch.nodes.errors import CERTIFICATE_FAILED

_FAILED = ".failed"
_OF_QUANTIZING = {"kl", "top1"}
"""Checks that fail because the model cannot bear the format, not because a file is wrong."""


def failed_checks(out: Path, formats: Sequence[str]) -> str:
    """A few lines: the checks that failed by format, with values and bounds, and the next step."""
    made = {form: out / f"{form}{_FAILED}" / CERTIFICATE_FILE for form in formats}
    wrong = {
        form: _wrong(json.loads(path.read_text(encoding="utf-8")))
        for form, path in made.items()
        if path.is_file()
    }
    if not wrong:
        return f"{CERTIFICATE_FAILED}but {out} holds no FORMAT{_FAILED} to look at"
    named = "; ".join(f"{', '.join(checks)} of {form}" for form, checks in wrong.items())
    values = [
        f"{form}: {', '.join(f'{name} {said}' for name, said in checks.items())}; "
        f"all of it: {out / (form + _FAILED) / PAGE_FILE}"
        for form, checks in wrong.items()
    ]
    return "\n".join([CERTIFICATE_FAILED + named, *values, f"next: {_next(wrong)}"])


def asked_otherwise(certificate: Mapping[str, Any], arguments: Sequence[str]) -> bool:
    """Whether a certificate was made under other bounds, or in another layout, than is asked now.

    Args:
        arguments: what the node hands to `mvl checkpoint release`.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--bound", action="append", default=[])
    parser.add_argument("--layout")
    asked, _ = parser.parse_known_args(list(arguments))
    layout = certificate.get("layout")
    other = layout is not None and asked.layout is not None and layout != asked.layout
    return other or certificate.get("changed_bounds", {}) != Bounds.parse(asked.bound).changed()


def _wrong(certificate: Mapping[str, Any]) -> dict[str, str]:
    """What was found by check that failed; those that could not be run count."""
    found = {
        check["name"]: f"is {check['measured']}, bound {check['bound']}"
        for check in certificate["checks"]
        if not check["passed"]
    }
    return found | dict.fromkeys(certificate.get("not_run", {}), "was not run")


def _next(wrong: Mapping[str, Mapping[str, str]]) -> str:
    """What a release engineer does about it."""
    if any(set(checks) - _OF_QUANTIZING for checks in wrong.values()):
        return (
            "open the page, which names file, tensor, layer or prompt; the release is not what its "
            "checkpoint is, and made again it will be the same until that is mended"
        )
    form, checks = next(iter(wrong.items()))
    return (
        "these weights lose more in the format than the bound allows: distil them for it (a stage "
        f"with distill.student: {form}), calibrate on more packs (arguments: [--packs=32]), or "
        f"accept it under a bound of its own (arguments: [--bound={next(iter(checks))}_{form}=...])"
        ", which the certificate lists"
    )
