"""Versions of what a result depends on, read from package metadata: nothing is imported."""

import importlib.metadata
import platform

PACKAGES = ("megatron-vl", "torch", "megatron-core", "megatron-energon")


def versions() -> dict[str, str]:
    """Python's version and that of each package; "not installed" where one is absent."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found
