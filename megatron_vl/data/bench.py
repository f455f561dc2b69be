"""`mvl data bench`: how fast samples and packs come, and where the time goes.

Of a source: samples one after the other in one thread, each part of the work timed on its own. Of a
stage: its loader as the trainer opens it, and the plan alone. CPU time is counted beside wall time:
on a busy machine it is the steadier figure. Every part runs for the seconds asked for, at least
one round.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from megatron_vl.config.schema import StageConfig
from megatron_vl.data.encode import encode_sample
from megatron_vl.data.fit import fit_sample, headers_of
from megatron_vl.data.loader import PackLoader
from megatron_vl.data.plan import DataEndedError
from megatron_vl.data.store import SourceStore
from megatron_vl.data.view import View

Tell = Callable[[str, int, int], None]

PARTS = (
    ("read", "row from disk, media headers"),
    ("fit", "tokens and tiles counted"),
    ("encode", "media read, decoded and cut; text tokenised"),
)


@dataclass
class Clock:
    """Wall and CPU seconds of one part of the work."""

    wall: float = 0.0
    cpu: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Add the time spent inside."""
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        self.wall += time.perf_counter() - wall
        self.cpu += time.process_time() - cpu


def time_source(
    store: SourceStore, view: View, seconds: float, tell: Tell = lambda doing, done, total: None
) -> dict[str, Any]:
    """Samples a second of each part of the work, in one thread, samples spread over the source."""
    clocks = {name: Clock() for name, _ in PARTS}
    done = dropped = tokens = tiles = 0
    until = time.monotonic() + seconds
    order = range(len(store.keys))
    step = max(1, len(order) // 997) | 1
    for at in order:
        key = store.keys[at * step % len(order)]
        with clocks["read"].running():
            sample = store.sample(key)
            headers = headers_of(sample)
        with clocks["fit"].running():
            fitted = fit_sample(sample, headers, view.tokenizer, view.room)
        if fitted.length == 0:
            dropped += 1
            continue
        with clocks["encode"].running():
            encode_sample(store, fitted, view.tokenizer, view.room)
        done, tokens, tiles = done + 1, tokens + fitted.length, tiles + fitted.tiles
        tell(f"{store.source}", done, 0)
        if time.monotonic() >= until:
            break
    whole = sum(clock.cpu for clock in clocks.values())
    return {
        "source": store.source,
        "samples": done,
        "too_long": dropped,
        "samples_per_cpu_s": _rate(done, whole),
        "tokens_per_cpu_s": _rate(tokens, whole),
        "tiles_per_cpu_s": _rate(tiles, whole),
        "parts": {
            name: {
                "what": what,
                "cpu_ms": _rate(clocks[name].cpu * 1e3, max(done, 1)),
                "wall_ms": _rate(clocks[name].wall * 1e3, max(done, 1)),
            }
            for name, what in PARTS
        },
    }


def time_stage(
    stage: StageConfig, seconds: float, tell: Tell = lambda doing, done, total: None
) -> dict[str, Any]:
    """Packs a second of a stage's loader, on one rank, and of its plan alone."""
    opening, loading, planning = Clock(), Clock(), Clock()
    tell("opening the loader", 0, 0)
    with opening.running():
        loader = PackLoader(stage, split="train", rank=0, size=1)
    packs = samples = tokens = tiles = 0
    until = time.monotonic() + seconds
    try:
        while time.monotonic() < until or not packs:
            with loading.running():
                batch = loader.next_batch()
            packs += len(batch)
            samples += sum(len(pack.sample_keys) for pack in batch)
            tokens += sum(pack.num_tokens for pack in batch)
            tiles += sum(len(pack.grids) for pack in batch)
            tell("reading packs", packs, 0)
    except DataEndedError:
        pass  # the blend ends; what came was timed
    finally:
        loader.close()
    quiet = replace(stage, data=replace(stage.data, prefetch=0))
    loader = PackLoader(quiet, split="train", rank=0, size=1)
    planned = 0
    until = time.monotonic() + min(seconds, 2.0)
    try:
        while time.monotonic() < until:
            with planning.running():
                loader.planned(planned)
            planned += 1
    except DataEndedError:
        pass  # the whole plan was timed
    finally:
        loader.close()
    return {
        "stage": stage.name,
        "opened_in_s": round(opening.wall, 3),
        "threads": stage.data.workers,
        "packs": packs,
        "packs_per_s": _rate(packs, loading.wall),
        "packs_per_cpu_s": _rate(packs, loading.cpu),
        "samples_per_s": _rate(samples, loading.wall),
        "tokens_per_s": _rate(tokens, loading.wall),
        "pictures_per_s": _rate(tiles, loading.wall),
        "planned_packs_per_s": _rate(planned, planning.wall),
    }


def _rate(count: float, seconds: float) -> float:
    return round(count / seconds, 3) if seconds else 0.0
