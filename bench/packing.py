"""Measure the planner: packs against the lower bound, balance of ranks, 30 million samples.

    python bench/packing.py                # all of it, two to three minutes
    python bench/packing.py --quick        # 1 million samples instead of 30

Lengths are a synthetic mix: half single images of common sizes through the tile grid rule, 12 %
pages, 8 % several images, 10 % video, the rest text. Costs are those of the published 12B sizes.
Times are process time, the best of several; memory is anonymous resident memory (RssAnon).
"""

import argparse
import json
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema_data import Packer, PackOrder
from megatron_vl.config.schema_model import ModelConfig
from megatron_vl.cost.pack_cost import pack_cost
from megatron_vl.data.blend import Share, SourceTable
from megatron_vl.data.cost_order import deal
from megatron_vl.data.packing import PackLimits, fewest_packs, pack
from megatron_vl.data.plan import PackPlan, PlanSettings
from megatron_vl.sequence.grids import num_tiles

RANKS = 32
WINDOW = 5000
SIZES = (
    (512, 512), (725, 725), (1024, 1024), (336, 336), (640, 480), (480, 640), (640, 427),
    (800, 600), (1024, 768), (1600, 1200), (1280, 720), (1920, 1080), (1536, 1024), (3000, 2000),
    (481, 202), (850, 600), (1700, 1200),
)  # fmt: skip
PAGES = ((1240, 1754), (1754, 1240), (1700, 2200), (595, 842), (850, 600))
STAGE_12B = Path(__file__).resolve().parents[1] / "stages" / "nano_12b_v2_vl" / "stage1.yaml"
Ints = NDArray[np.int64]


def model_12b() -> ModelConfig:
    """The published sizes, as the 12B recipe has them."""
    return load_stage(STAGE_12B).model


def synthetic_mix(count: int, cap: int, seed: int) -> SourceTable:
    """Lengths and tiles of a mix of samples that each fit a sequence of `cap` tokens."""
    random = np.random.default_rng(seed)

    def tiles_of(sizes: tuple[tuple[int, int], ...]) -> Ints:
        return np.array([num_tiles(*size, tile_size=512, max_tiles=12) for size in sizes])

    kind = random.choice(5, count, p=[0.5, 0.12, 0.08, 0.1, 0.2])
    single, page = tiles_of(SIZES), tiles_of(PAGES)
    most = (cap - 200) // 256
    tiles = np.zeros(count, dtype=np.int64)
    tiles[kind == 0] = random.choice(single, (kind == 0).sum())
    tiles[kind == 1] = random.choice(page, (kind == 1).sum())
    several = random.integers(2, 7, (kind == 2).sum()) * random.choice(single, (kind == 2).sum())
    tiles[kind == 2] = np.minimum(several, most)
    frames = np.clip(random.lognormal(4.2, 0.7, (kind == 3).sum()), 8, 128).astype(np.int64)
    tiles[kind == 3] = np.minimum(frames, most * 3 // 4)
    middle = np.array([4.6, 6.4, 5.5, 5.0, 7.0])[kind]
    spread = np.array([0.9, 0.6, 0.8, 0.7, 1.0])[kind]
    text = 30 + random.lognormal(middle, spread).astype(np.int64)
    lengths = np.minimum(text + 256 * tiles + 2 * (tiles > 0), cap)
    return SourceTable(lengths.astype(np.int32), tiles.astype(np.int32))


def published_greedy_knapsack(lengths: list[int], cap: int) -> list[list[int]]:
    """The packer of the public Megatron-LM example, in the fewest lines: sort, then fill one pack
    after the other with the largest length that still fits."""
    lengths = sorted(lengths)
    packs = []
    while lengths:
        room, members = cap, []
        while (at := bisect_right(lengths, room) - 1) >= 0:
            members.append(lengths.pop(at))
            room -= members[-1]
        packs.append(members)
    return packs


def best_ms(job: Callable[[], object], times: int = 7) -> float:
    """Least process time of several runs, in milliseconds."""
    spent = []
    for _ in range(times):
        started = time.process_time()
        job()
        spent.append(time.process_time() - started)
    return 1e3 * min(spent)


def anonymous_mb() -> float:
    """RssAnon of this process, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) / 1024
    raise OSError("this system does not tell RssAnon")


def settings_for(cap: int, batch: int, run: int) -> PlanSettings:
    """Plans as a stage has them by default; a run of 0 leaves packs in random order."""
    settings = PlanSettings(PackLimits(cap), WINDOW, seed=1, batch=batch)
    if not run:
        return settings
    parts = {"encoder", "projector", "decoder"}
    cost = pack_cost(model_12b(), sequence_length=cap, tile_size=512, trainable=parts)
    return replace(settings, order=PackOrder.aligned, cost=cost, run=run)


def compare_packers(cap: int) -> None:
    """Packs of 10,000 samples by every packer, beside the published one."""
    mix = synthetic_mix(10_000, cap, seed=0)
    lengths, limits = mix.lengths_N.astype(np.int64), PackLimits(cap)
    bound = fewest_packs(lengths, limits)
    print(
        f"\n10,000 samples into packs of {cap}: mean {lengths.mean():.0f}, "
        f"p50 {np.median(lengths):.0f}, p99 {np.percentile(lengths, 99):.0f}; lower bound {bound}"
    )
    print(f"{'packer':32}{'packs':>7}{'over bound':>12}{'fill':>8}{'ms':>8}{'most samples':>14}")

    def row(name: str, packs: int, ms: float, most: int) -> None:
        over, fill = packs / bound - 1, lengths.sum() / packs / cap
        print(f"{name:32}{packs:7}{over:12.3%}{fill:8.4f}{ms:8.1f}{most:14}")

    plain = lengths.tolist()
    found = published_greedy_knapsack(plain, cap)
    ms = best_ms(lambda: published_greedy_knapsack(plain, cap))
    row("published greedy knapsack", len(found), ms, max(map(len, found)))
    for packer in Packer:
        for spare in (0.01, 20.0) if packer is Packer.balanced else (0.0,):
            pack_of = pack(packer, lengths, mix.tiles_N, limits, spare)
            ms = best_ms(lambda p=packer, s=spare: pack(p, lengths, mix.tiles_N, limits, s), 5)  # type: ignore[misc]
            name = f"{packer.name}{f', {spare:g} spare' if spare else ''}"
            row(name, int(pack_of.max()) + 1, ms, int(np.bincount(pack_of).max()))
    plan = PackPlan({"mix": mix}, {"mix": Share(1, 1)}, settings_for(cap, 128, 128))
    tables = list(plan.rounds())

    def plan_again() -> list[object]:
        again = PackPlan({"mix": mix}, {"mix": Share(1, 1)}, plan.settings)
        return list(again.rounds())

    most = max(int(np.diff(table.bounds_P).max()) for table in tables)
    row(f"plan, windows of {WINDOW}, carried", sum(map(len, tables)), best_ms(plan_again, 3), most)


def balance(cap: int, count: int = 150_000) -> None:
    """Mean over slowest rank of each step, random beside cost-aligned order.

    `tiles` is the spread over steps of a global batch's tiles: how much steps differ in kind.
    """
    mix = synthetic_mix(count, cap, seed=2)
    cost = settings_for(cap, 1, 1).cost
    assert cost is not None
    for batch in (RANKS, 4 * RANKS):
        for name, run in (("random", 0), ("whole batch", batch), (f"runs of {RANKS}", RANKS)):
            if run == batch and name != "whole batch":
                continue
            plan = PackPlan({"mix": mix}, {"mix": Share(1, 1)}, settings_for(cap, batch, run))
            costs, tiles, tokens = [], [], 0
            for table in plan.rounds():
                rest = cap - table.total(table.length_N)
                squares = table.total(table.length_N**2) + rest**2
                tiles.append(table.total(table.tiles_N))
                costs.append(cost.of(np.full(len(table), cap), tiles[-1], squares))
                tokens += int(table.length_N.sum())
            cost_P, tiles_P = np.concatenate(costs).astype(float), np.concatenate(tiles)
            whole = len(cost_P) // batch * batch
            steps, pictures = cost_P[:whole].reshape(-1, batch), tiles_P[:whole].reshape(-1, batch)
            ranks = np.stack([steps[:, deal(batch, r, RANKS)].sum(1) for r in range(RANKS)], 1)
            efficiency = ranks.mean(1).sum() / ranks.max(1).sum()
            spread, fill = (
                pictures.sum(1).std() / pictures.sum(1).mean(),
                tokens / len(cost_P) / cap,
            )
            print(
                f"{cap:6}{batch:14}  {name:12}{efficiency:12.4f}{fill:8.4f}"
                f"{cost_P.std() / cost_P.mean():9.3f}{spread:8.3f}{len(steps):7}"
            )


def large_plan(count: int, cap: int = 16384) -> None:
    """A plan over many samples: first pack, all packs, memory, and a start far from the front."""
    pool = synthetic_mix(200_000, cap, seed=3)
    random = np.random.default_rng(4)
    tables = {}
    for source, share in (("images", 0.6), ("pages", 0.25), ("text", 0.15)):
        chosen = random.integers(0, 200_000, int(count * share), dtype=np.int32)
        tables[source] = SourceTable(pool.lengths_N[chosen], pool.tiles_N[chosen])
    del chosen
    shares = {source: Share(len(table.lengths_N), 1) for source, table in tables.items()}
    print(f"\n{count:,} samples in {len(tables)} sources; RssAnon {anonymous_mb():.0f} MB with")
    print("their lengths and tiles in memory (8 bytes a sample)")
    started = time.perf_counter()
    plan = PackPlan(tables, shares, settings_for(cap, 128, 32))
    plan[0]
    print(f"first pack after {time.perf_counter() - started:.2f} s, {anonymous_mb():.0f} MB")
    packs = samples = tokens = 0
    peak = 0.0
    for number, table in enumerate(plan.rounds()):
        if samples < count * 2 // 3:
            far, mark = packs, plan.mark(packs)  # as it is written when a stage saves
        packs, samples = packs + len(table), samples + len(table.length_N)
        tokens += int(table.length_N.sum())
        peak = max(peak, anonymous_mb()) if number % 50 == 0 else peak
    seconds = time.perf_counter() - started
    print(
        f"all {packs:,} packs after {seconds:.0f} s ({1e6 * seconds / samples:.2f} us a sample), "
        f"fill {tokens / packs / cap:.4f}, peak {peak:.0f} MB"
    )
    assert samples == count
    size = len(json.dumps(mark.to_json()))
    started = time.perf_counter()
    fresh = PackPlan(tables, shares, plan.settings)
    fresh.remember(mark)
    there = fresh[far]
    seconds = time.perf_counter() - started
    print(f"pack {far:,} from a mark of {size / 1024:.0f} KB after {seconds:.2f} s", end=", ")
    started = time.perf_counter()
    assert plan[far] == there
    print(f"by the plan that has passed it after {time.perf_counter() - started:.2f} s")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="1 million samples instead of 30")
    quick = parser.parse_args().quick
    for cap in (16384, 49152):
        compare_packers(cap)
    print(f"\nefficiency of {RANKS} data-parallel ranks (mean over slowest), windows of {WINDOW}")
    print(
        f"{'length':>6}{'global batch':>14}  {'order':12}{'efficiency':>12}{'fill':>8}"
        f"{'cost cv':>9}{'tiles':>8}{'steps':>7}"
    )
    for cap in (16384, 49152):
        balance(cap)
    large_plan(1_000_000 if quick else 30_000_000)


if __name__ == "__main__":
    main()
