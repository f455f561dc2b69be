"""The rules of the data section: blends, packs and what may go wrong with a sample.

As in `check.py`, every rule gives a message with the nearest valid value instead of raising.
"""

import difflib
import math
from collections.abc import Iterator

from megatron_vl.config.schema import StageConfig


def data_ranges(config: StageConfig) -> dict[str, tuple[float, int]]:
    """Keys with a lower bound: value and bound."""
    data = config.data
    return {
        "data.sequence_length": (data.sequence_length, 1),
        "data.tile_size": (data.tile_size, 1),
        "data.max_tiles": (data.max_tiles, 1),
        "data.packing_window": (data.packing_window, 1),
        "data.document_alignment": (data.document_alignment, 1),
        "data.spare_packs": (data.spare_packs, 0),
        "data.max_tiles_per_pack": (data.max_tiles_per_pack, 0),
        "data.max_samples_per_pack": (data.max_samples_per_pack, 0),
        "data.aligned_packs": (data.aligned_packs, 0),
        "data.workers": (data.workers, 1),
        "data.prefetch": (data.prefetch, 0),
        "data.max_bad_fraction": (data.max_bad_fraction, 0),
    }


def check_data(config: StageConfig) -> Iterator[str]:
    """Every rule that a data section breaks."""
    yield from _blend(config)
    yield from _packs(config)


def _blend(config: StageConfig) -> Iterator[str]:
    """What is drawn, and how often."""
    data = config.data
    if data.blend_file:
        yield (
            f"data.blend_file is {data.blend_file!r} in a resolved stage; load it from a stage "
            "file, or give data.blend"
        )
    if not data.blend:
        yield "data.blend is empty, must name at least one source, as in {captions: 1.0}"
    for source, weight in data.blend.items():
        if not 0 < weight < math.inf:
            yield (
                f"data.blend.{source} is {weight}, must be above 0; leave the source out to draw "
                "nothing from it"
            )
    for source, epochs in data.epochs.items():
        if not 0 < epochs < math.inf:
            yield (
                f"data.epochs.{source} is {epochs}, must be above 0; leave the source out for one "
                "that never ends"
            )
        if source not in data.blend and data.blend:
            near = difflib.get_close_matches(source, data.blend, 1, 0.0)
            yield (
                f"data.epochs names {source!r}, which data.blend does not draw from; the nearest "
                f"source is {near[0]!r}"
            )


def _packs(config: StageConfig) -> Iterator[str]:
    """What one pack may hold."""
    data = config.data
    if data.sequence_length % data.document_alignment:
        nearest = max(1, round(data.sequence_length / data.document_alignment))
        yield (
            f"data.sequence_length is {data.sequence_length}, must be a multiple of "
            f"data.document_alignment {data.document_alignment}; nearest valid: "
            f"{nearest * data.document_alignment}"
        )
    image = data.max_tiles + (1 if data.max_tiles > 1 else 0)
    if 0 < data.max_tiles_per_pack < image:
        yield (
            f"data.max_tiles_per_pack is {data.max_tiles_per_pack}, but one image may have {image} "
            f"tiles (data.max_tiles {data.max_tiles} and a thumbnail); nearest valid: {image}, or "
            "0 for no limit"
        )
    if not data.max_bad_fraction < 1:
        yield (
            f"data.max_bad_fraction is {data.max_bad_fraction}, must be below 1; a usual value: "
            "0.001"
        )
