"""`mvl data`: make the data sets a recipe reads, and look at them."""

import json
from argparse import Namespace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import exit_codes
from launch.progress import Meter
from launch.tables import print_table

if TYPE_CHECKING:
    from megatron_vl.config.schema import StageConfig


def prepare(args: Namespace) -> int:
    """Build the data of a recipe under its `data.root`, or index a folder of shards."""
    folder = Path(args.recipe)
    if folder.is_dir() and not any(folder.glob("*.yaml")) and any(folder.glob("*.tar")):
        return _index(folder, args.workers)
    from megatron_vl.data.prepare import prepare_recipe

    root = prepare_recipe(
        folder,
        args.overrides,
        force=args.force,
        progress=lambda text: print(text, flush=True),
    )
    print(f"data is ready in {root}")
    return exit_codes.OK


def _index(folder: Path, workers: int) -> int:
    from megatron_vl.data.index import index_source

    with Meter() as meter:
        problems = index_source(
            folder, workers=workers, tell=lambda done, total: meter("reading shards", done, total)
        )
    for problem in problems:
        print(f"{problem.shard}: {problem.member}: {problem.text}")
    print(f"{folder} is indexed; {len(problems)} files in it cannot be read")
    return exit_codes.FOUND if problems else exit_codes.OK


def convert(args: Namespace) -> int:
    """Turn a public set into a source, and say what was kept and what was not."""
    from megatron_vl.data.convert.run import Request, convert

    request = Request(
        format=args.format,
        source=Path(args.source),
        out=Path(args.out),
        media_root=Path(args.media_root) if args.media_root else None,
        shard_size=args.shard_size,
        workers=args.workers,
        limit=args.limit,
        fraction=args.fraction,
        held_out=args.held_out,
        seed=args.seed,
        strict=not args.skip_missing,
        resume=args.resume,
    )
    with Meter() as meter:
        report = convert(request, meter)
    if args.json:
        print(json.dumps(report))
    else:
        _print_conversion(report, request.out)
    return exit_codes.OK


def _print_conversion(report: dict[str, Any], out: Path) -> None:
    kept, media = report["kept"], report["media"]
    rows = [
        ("kept for training", str(kept["train"]), ""),
        ("kept for validation", str(kept["val"]), ""),
        *((f"dropped: {_cells(entry)[0]}", *_cells(entry)[1:]) for entry in report["by_reason"]),
        *((f"noted: {_cells(entry)[0]}", *_cells(entry)[1:]) for entry in report["notes"]),
    ]
    print_table("", ("", "at rows", "rows"), [(a, c, b) for a, b, c in rows], left=2)
    for name, text in report["broken_media"].items():
        print(f"{name}: {text}")
    if not kept["val"]:
        print("no row is held out: a stage cannot evaluate on this source; see --held-out")
    print(
        f"{out}: {sum(kept.values())} of {report['chosen']} rows kept, {media['image']} images, "
        f"{media['video']} videos, {media['bytes'] / 1e6:,.1f} MB of media; every row that was "
        f"not kept is in {out / 'findings.jsonl'}"
    )


def _cells(entry: dict[str, Any]) -> tuple[str, str, str]:
    """Reason, count and first rows of a report's entry."""
    files = {file for file, _ in entry["rows"]}
    shown = [str(row) if len(files) == 1 else f"{file}:{row}" for file, row in entry["rows"][:6]]
    more = " ..." if entry["count"] > len(shown) else ""
    return entry["reason"], str(entry["count"]), ", ".join(shown) + more


def inspect(args: Namespace) -> int:
    """Write a page of samples."""
    from megatron_vl.data.inspect import cards_of, facts_table, render, spread
    from megatron_vl.data.view import open_splits, open_view, source_folders
    from megatron_vl.run.atomic import write_text

    stage = _stage(args)
    cards = []
    with Meter() as meter:
        for folder in source_folders(Path(args.data)):
            view = open_view(folder, stage, _path(args.tokenizer))
            stores = open_splits(folder)
            keys = {store.split: spread(store.keys, args.count) for store in stores[:1]}
            if args.key:
                keys = {
                    store.split: [key for key in args.key if key in store.keys] for store in stores
                }
            for store in stores:
                wanted = keys.get(store.split, [])
                for done, card in enumerate(cards_of(store, wanted, view), 1):
                    cards.append(card)
                    meter(f"rendering {store.source}", done, len(wanted))
                store.close()
    if not cards:
        raise ValueError(f"{args.data} has no sample {', '.join(args.key)}")
    write_text(Path(args.out), render(cards, f"{len(cards)} samples of {args.data}"))
    for row in facts_table(cards):
        facts = ", ".join(f"{name} {value}" for name, value in row.items() if name not in _NAMES)
        print(f"{row['source']} {row['key']}: {row['error'] or facts}")
    print(f"{args.out}: {len(cards)} samples")
    return exit_codes.OK


_NAMES = ("source", "key", "error")


def stats(args: Namespace) -> int:
    """Count what sources hold, or what a stage reads."""
    from megatron_vl.data.stats import source_stats, stage_stats
    from megatron_vl.data.view import source_folders

    with Meter() as meter:
        if _is_stage(args.data):
            found = stage_stats(_load(args.data, args.overrides), workers=args.workers, tell=meter)
        else:
            found = source_stats(
                source_folders(Path(args.data)),
                _stage(args),
                _path(args.tokenizer),
                workers=args.workers,
                tell=meter,
            )
    if args.json:
        print(json.dumps(found))
        return exit_codes.OK
    _print_stats(found)
    return exit_codes.OK


def _print_stats(found: dict[str, Any]) -> None:
    plan = found.get("plan")
    rows = []
    for entry in found["sources"]:
        tokens, tiles = entry["tokens"], entry["tiles"]
        rows.append(
            (
                entry["source"],
                entry["split"],
                f"{entry['samples']:,}",
                f"{tokens['sum']:,}",
                f"{tokens['mean']:,.0f}",
                f"{tokens['p50']:,.0f}",
                f"{tokens['p99']:,.0f}",
                f"{tokens['max']:,}",
                f"{tiles['mean']:.2f}",
                f"{tiles['max']}",
                f"{entry['share_of_samples']:.3f}",
                f"{entry['share_of_tokens']:.3f}",
            )
        )
    names = ("source", "split", "samples", "tokens", "mean", "p50", "p99", "max",
             "tiles mean", "max", "of samples", "of tokens")  # fmt: skip
    print_table(f"Samples within {found['sequence_length']:,} tokens", names, rows, left=2)
    cuts = [
        (
            entry["source"],
            entry["split"],
            *(
                f"{entry[name]:,}"
                for name in ("fewer_tiles", "fewer_frames", "text_cut", "too_long", "unreadable")
            ),
        )
        for entry in found["sources"]
    ]
    columns = ("source", "split", "fewer tiles", "fewer frames", "text cut", "dropped: too long",
               "dropped: unreadable")  # fmt: skip
    print_table("What gave way", columns, cuts, left=2)
    for entry in found["sources"]:
        for text in entry["errors"]:
            print(f"{entry['source']} {entry['split']}: {text}")
    _print_histogram("tokens of a sample", found["sources"], "tokens_histogram")
    _print_histogram("tiles of a sample", found["sources"], "tiles_histogram")
    if plan is not None:
        shares = [
            (source, f"{plan['samples'][source]:.4f}", f"{plan['tokens'][source]:.4f}")
            for source in plan["samples"]
        ]
        title = f"The first {plan['packs']:,} packs, {plan['fill']:.4f} full"
        print_table(title, ("source", "of samples", "of tokens"), shares, left=1)
        _print_histogram("samples of a pack", [plan], "samples_a_pack_histogram")
        _print_histogram("tiles of a pack", [plan], "tiles_a_pack_histogram")


def _print_histogram(title: str, entries: list[dict[str, Any]], key: str) -> None:
    """One line a bin, with a bar as long as its part."""
    bins: dict[str, int] = {}
    for entry in sorted(entries, key=lambda entry: -len(entry[key])):
        for name, count in entry[key]:
            bins[name] = bins.get(name, 0) + count
    most = max(bins.values(), default=0)
    if most:
        rows = [
            (name, "#" * round(40 * count / most), f"{count:,}") for name, count in bins.items()
        ]
        print_table(title, ("", "", "samples" if "sample" in title else ""), rows, left=2)


def validate(args: Namespace) -> int:
    """Check sources; FOUND if anything is wrong with them."""
    from collections import Counter
    from dataclasses import asdict

    from megatron_vl.data.validate import validate
    from megatron_vl.data.view import source_folders

    with Meter() as meter:
        samples, troubles = validate(
            source_folders(Path(args.data)),
            decode_all=args.decode_all,
            workers=args.workers,
            tell=meter,
        )
    if args.json:
        print(json.dumps({"samples": samples, "findings": [asdict(found) for found in troubles]}))
        return exit_codes.FOUND if troubles else exit_codes.OK
    for found in troubles:
        print(found.text())
    counts = Counter(found.reason for found in troubles)
    if counts:
        rows = [(reason, f"{count:,}") for reason, count in counts.most_common()]
        print_table("", ("what is wrong", "samples"), rows, left=1)
    print(f"{samples:,} samples looked at, {len(troubles):,} findings")
    return exit_codes.FOUND if troubles else exit_codes.OK


def bench(args: Namespace) -> int:
    """Measure sources, or a stage and its sources."""
    from megatron_vl.data.bench import time_source, time_stage
    from megatron_vl.data.view import open_splits, open_view, source_folders

    stage = _load(args.data, args.overrides) if _is_stage(args.data) else _stage(args)
    result: dict[str, Any] = {"sources": []}
    with Meter() as meter:
        if _is_stage(args.data):
            assert stage is not None
            root = Path(stage.data.root)
            folders = [root / source for source in sorted(stage.data.blend)]
            result["stage"] = time_stage(stage, args.seconds, meter)
        else:
            folders = source_folders(Path(args.data))
        for folder in folders:
            view = open_view(folder, stage, _path(args.tokenizer))
            store = open_splits(folder)[0]
            result["sources"].append(time_source(store, view, args.seconds, meter))
            store.close()
    if args.json:
        print(json.dumps(result))
        return exit_codes.OK
    rows = [
        (
            entry["source"],
            *(f"{entry[name]:,.0f}" for name in ("samples_per_cpu_s", "tiles_per_cpu_s")),
            *(f"{entry['parts'][part]['cpu_ms']:.2f}" for part in ("read", "fit", "encode")),
        )
        for entry in result["sources"]
    ]
    names = ("source", "samples/CPU s", "tiles/CPU s", "read ms", "fit ms", "encode ms")
    print_table("One thread, a sample at a time", names, rows, left=1)
    if "stage" in result:
        found = result["stage"]
        print(
            f"{found['stage']}: {found['packs_per_s']:,.1f} packs/s "
            f"({found['packs_per_cpu_s']:,.1f} a CPU second), {found['samples_per_s']:,.0f} "
            f"samples/s, {found['tokens_per_s']:,.0f} tokens/s with {found['threads']} threads; "
            f"opened in {found['opened_in_s']:.1f} s; the plan alone "
            f"{found['planned_packs_per_s']:,.0f} packs/s"
        )
    return exit_codes.OK


def _is_stage(text: str) -> bool:
    return Path(text).suffix in (".yaml", ".yml")


def _load(text: str, overrides: list[str]) -> "StageConfig":
    from megatron_vl.config.load import load_stage

    return load_stage(Path(text), overrides)


def _stage(args: Namespace) -> "StageConfig | None":
    """The stage a folder is looked at with; None for the published sizes."""
    return _load(args.stage, getattr(args, "overrides", [])) if args.stage else None


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)
