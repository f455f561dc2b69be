"""Rules of the keys that say how images and videos are shown. Part of `check.py`."""

import math
from collections.abc import Iterator

from megatron_vl.config.schema import StageConfig
from megatron_vl.config.schema_data import Tiling

PATCHES_PER_TOKEN = 4


def check_vision(config: StageConfig) -> Iterator[str]:
    """The rules that data.tiling, its patch budget and data.video break."""
    if config.data.tiling is Tiling.native:
        yield from _native(config)
    yield from _frames(config)
    yield from _pruning(config)


def _native(config: StageConfig) -> Iterator[str]:
    """A whole image's patches: a budget that is not empty and that the position table can hold."""
    low, high = config.data.min_patches, config.data.max_patches
    edge = config.model.encoder.position_grid // 2 * 2
    if not PATCHES_PER_TOKEN <= high <= edge**2:
        nearest = min(max(high, PATCHES_PER_TOKEN), edge**2)
        yield (
            f"data.max_patches is {high}, must be between {PATCHES_PER_TOKEN} (one token) and "
            f"{edge**2} (model.encoder.position_grid {config.model.encoder.position_grid} squared, "
            f"even edges); nearest valid: {nearest}"
        )
    elif not 0 <= low <= high:
        yield (
            f"data.min_patches is {low}, must be between 0 and data.max_patches {high}; nearest "
            f"valid: {0 if low < 0 else high}"
        )


def _frames(config: StageConfig) -> Iterator[str]:
    """How many frames of a clip are taken."""
    video = config.data.video
    if not 0 < video.fps < math.inf:
        yield f"data.video.fps is {video.fps}, must be a number above 0; a usual value: 2.0"
    if video.min_frames < 1:
        yield f"data.video.min_frames is {video.min_frames}, must be at least 1; nearest valid: 1"
    elif video.max_frames < video.min_frames:
        yield (
            f"data.video.max_frames is {video.max_frames}, must be at least data.video.min_frames "
            f"{video.min_frames}; nearest valid: data.video.max_frames {video.min_frames}"
        )


def _pruning(config: StageConfig) -> Iterator[str]:
    """One pruning rate, or two in ascending order."""
    rates = config.data.video.evs_rate
    if len(rates) not in (1, 2):
        yield (
            f"data.video.evs_rate has {len(rates)} numbers, must have one rate or the two ends of "
            f"a range; nearest valid: {rates[:2] or [0.0]}"
        )
        return
    for rate in rates:
        if not 0 <= rate < 1:
            nearest = 0.99 if rate >= 1 else 0.0
            yield (
                f"data.video.evs_rate holds {rate}, must be at least 0 and below 1; nearest valid: "
                f"{nearest}"
            )
    if rates != sorted(rates):
        yield (
            f"data.video.evs_rate is {rates}, a range must start with its lower end; nearest "
            f"valid: {sorted(rates)}"
        )
