"""`mvl data ledger` and `mvl data show`: which samples a stage has trained on, step by step.

The ledger holds a digest of each step's samples; the plan says which they are. Both are asked: the
ids are computed from the stage's resolved config and compared with the digest before they are
printed or shown. Costs the opening of the stage's sources; `show` decodes the pictures of one step.
"""

import json
import sys
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import exit_codes
from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import RunError, RunFolder, StageFolder
from megatron_vl.run.metrics import is_step, read_metrics

if TYPE_CHECKING:
    from megatron_vl.data.inspect import Card


class OtherDataError(ValueError):
    """The plan gives other samples than the ledger says were used."""


@dataclass(frozen=True)
class Used:
    """A sample of a step, and the pack it stood in."""

    step: int
    pack: int
    source: str
    key: str
    epoch: int


def used_samples(stage: StageFolder, step: int | None) -> Iterator[Used]:
    """The samples of one step, or of all, in order.

    Raises:
        RunError: the ledger tells of no such step.
        OtherDataError: the data has been prepared anew since.
    """
    from megatron_vl.data.ledger import digest_of, lineage
    from megatron_vl.data.loader import PackLoader

    ledger = stage.path / "data.jsonl"
    lines = [line for line in lineage(ledger) if step is None or line["step"] == step]
    if not lines:
        which = "" if step is None else f" {step} that led to the latest weights"
        raise RunError(f"{ledger} tells of no step{which}")
    loader = PackLoader(load_stage(stage.config_path), split="train", rank=0, size=1)
    try:
        for line in lines:
            first, end = line["packs"]
            packs = {
                number: [loader.identify(sample) for sample in loader.planned(number)]
                for number in range(first, end)
            }
            if digest_of(one for pack in packs.values() for one in pack) != line["ids"]:
                raise OtherDataError(
                    f"step {line['step']}: the plan gives other samples than were used; the data "
                    f"under {stage.config_path} has been prepared anew since"
                )
            for number, pack in packs.items():
                for source, key, epoch in pack:
                    yield Used(line["step"], number, source, key, epoch)
    finally:
        loader.close()


def main(args: Namespace) -> int:
    """Print one line of JSON a sample: step, pack, source, key, epoch."""
    stage = _run(args.run).stage(args.stage)
    try:
        for used in used_samples(stage, args.step):
            print(json.dumps(vars(used)))
    except OtherDataError as error:
        print(error, file=sys.stderr)
        return exit_codes.FOUND
    return exit_codes.OK


def show(args: Namespace) -> int:
    """Write a page of the packs of one step, with what the step measured."""
    from megatron_vl.data.inspect import render
    from megatron_vl.run.atomic import write_text

    stage = _stage_of(_run(args.run), args.stage)
    try:
        samples = list(used_samples(stage, args.step))
    except OtherDataError as error:
        print(error, file=sys.stderr)
        return exit_codes.FOUND
    title = f"{stage.name}, step {args.step}{_measured(stage, args.step)}"
    write_text(Path(args.out), render(list(_cards(stage, samples)), title))
    packs = len({used.pack for used in samples})
    print(f"{args.out}: {title}; {len(samples)} samples in {packs} packs")
    return exit_codes.OK


def _run(path: str) -> RunFolder:
    run = RunFolder(path)
    if not run.exists():
        raise RunError(f"{path}: not a run folder; `mvl status` lists those under runs/")
    return run


def _stage_of(run: RunFolder, name: str | None) -> StageFolder:
    """A stage by its name; without one the last that has trained."""
    if name is not None:
        return run.stage(name)
    trained = [stage for stage in run.stages() if (stage.path / "data.jsonl").exists()]
    if not trained:
        raise RunError(f"{run.path}: no stage of it has trained yet")
    return trained[-1]


def _measured(stage: StageFolder, step: int) -> str:
    """Loss and gradient norm of a step, and the loss of the step before."""
    lines = {line["step"]: line for line in read_metrics(stage.metrics_path) if is_step(line)}
    if step not in lines:
        return ""
    line, before = lines[step], lines.get(step - 1)
    said = f": loss {line['loss']:.4f}, gradient {line['grad_norm']:.3f}"
    return said + (f"; loss {before['loss']:.4f} the step before" if before else "")


def _cards(stage: StageFolder, samples: list[Used]) -> Iterator["Card"]:
    """The samples as cards, pack by pack; what stood in for a broken one in its place."""
    from megatron_vl.data.inspect import cards_of
    from megatron_vl.data.ledger import read_lines
    from megatron_vl.data.store import SourceStore
    from megatron_vl.data.view import open_view

    config = load_stage(stage.config_path)
    broken = {
        (line["bad"]["pack"], line["bad"]["key"]): line["bad"]["instead"]
        for path in stage.path.glob("bad_samples.*.jsonl")
        for line in read_lines(path)
    }
    sources = {used.source for used in samples}
    stores = {source: SourceStore(config.data.root, source, "train") for source in sources}
    view = open_view(Path(config.data.root), config, None)
    for used in samples:
        store = stores[used.source]
        instead = broken.get((used.pack, used.key))
        facts = [("pack", str(used.pack)), ("epoch", str(used.epoch))]
        facts += [("stands in for", used.key)] if instead else []
        for card in cards_of(store, [instead or used.key], view):
            yield replace(card, facts=(*facts, *card.facts))
    for store in stores.values():
        store.close()
