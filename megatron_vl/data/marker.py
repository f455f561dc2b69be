"""What a finished build of the laptop's data says of itself, and whether its builder has changed.

Imports no torch: plans on a login node look here.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

MARKER = "prepared.json"
"""Written last, beside the sources: a folder without it is no finished build."""

_BUILDER_FILES = (
    "prepare.py",
    "tokenizer.py",
    "laptop_sources.py",
    "laptop_material.py",
    "laptop_described.py",
    "laptop_text.py",
    "documents.py",
    "pictures.py",
    "laptop_clips.py",
)


def read_marker(root: Path) -> dict[str, Any] | None:
    """What a finished build says about itself; None where there is no finished build."""
    try:
        marker = json.loads((root / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and "digest" in marker else None


def builder_digest() -> str:
    """Digest of the builder's own source: other code, other data."""
    digest = hashlib.sha256()
    for name in _BUILDER_FILES:
        digest.update(Path(__file__).with_name(name).read_bytes())
    return digest.hexdigest()[:16]


def built_by_other_code(root: Path) -> bool:
    """Whether a build of the laptop's data lies there that today's builder would make otherwise."""
    marker = read_marker(root)
    return marker is not None and marker.get("inputs", {}).get("code") != builder_digest()
