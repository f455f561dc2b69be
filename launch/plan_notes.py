"""What a plan says of keys that are set and not read by a stage, or not on the site's machines.

What a config alone can tell is refused when it is loaded (`config.conditions`). That no source of a
stage shows video is only to be seen in the data: the first files of each prepared source say so.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from launch.site_schema import Launcher, SiteConfig
from megatron_vl.config.conditions import PLATFORM_KEYS
from megatron_vl.config.load import DEFAULT_ORIGIN
from megatron_vl.config.recipe import Recipe
from megatron_vl.config.schema import StageConfig
from megatron_vl.config.settle import NOT_READ

_INDEX = Path(".nv-meta", "index.sqlite")
_LOOKED_AT = 5000
"""Files of a source that are looked at; an index of millions is not read for a note."""
_VIDEO = ("avi", "m4v", "mkv", "mov", "mp4", "mpeg", "mpg", "ts", "webm", "wmv")


def not_read(recipe: Recipe, names: Sequence[str], site: SiteConfig) -> list[str]:
    """One line a key: what a later key has switched off, and what other platforms alone read."""
    notes: dict[str, list[str]] = {}
    on_gpus = site.launcher is Launcher.slurm and site.nodes.gpus > 0
    for name, path, config in recipe.stages:
        if name not in names:
            continue
        blind = shows_no_video(config)
        for key, origin in recipe[name].origins.items():
            if origin.startswith(NOT_READ):
                reason = f"{key}, as {origin.removeprefix(NOT_READ)}"
                notes.setdefault(reason, []).append(config.name)
            elif key in PLATFORM_KEYS and origin != DEFAULT_ORIGIN and on_gpus:
                reason = f"{key} ({origin}), for {PLATFORM_KEYS[key]} alone"
                notes.setdefault(reason, []).append(config.name)
            elif blind and key.startswith("data.video.") and origin.startswith(f"{path}:"):
                reason = f"{key} ({origin}), as no source shows video in its first files"
                notes.setdefault(reason, []).append(config.name)
    return [f"{', '.join(stages)}: {reason}" for reason, stages in notes.items()]


def shows_no_video(config: StageConfig) -> bool:
    """Whether every source of a stage is prepared and none has a video among its first files."""
    indexes = [Path(config.data.root) / source / _INDEX for source in config.data.blend]
    return all(index.is_file() for index in indexes) and not any(map(_shows_video, indexes))


def _shows_video(index: Path) -> bool:
    first = f"select part_name from sample_parts limit {_LOOKED_AT}"
    with closing(sqlite3.connect(f"{index.resolve().as_uri()}?mode=ro", uri=True)) as opened:
        names = [name for (name,) in opened.execute(f"select distinct part_name from ({first})")]
    return any(name.rpartition(".")[2].lower() in _VIDEO for name in names)
