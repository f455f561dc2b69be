"""`mvl data ledger`: which samples a stage has trained on, step by step.

The ledger holds a digest of each step's samples; the plan says which they are. Both are asked: the
ids are computed from the stage's resolved config and compared with the digest before they are
printed. Costs the opening of the stage's sources; no image is decoded.
"""

import json
import sys
from argparse import Namespace

from launch import exit_codes
from megatron_vl.config.load import load_stage
from megatron_vl.run.folder import RunError, RunFolder


def main(args: Namespace) -> int:
    """Print one line of JSON a sample: step, pack, source, key, epoch."""
    from megatron_vl.data.ledger import digest_of, lineage
    from megatron_vl.data.loader import PackLoader

    run = RunFolder(args.run)
    if not run.exists():
        raise RunError(f"{args.run}: not a run folder; `mvl status` lists those under runs/")
    stage = run.stage(args.stage)
    lines = [
        line
        for line in lineage(stage.path / "data.jsonl")
        if args.step is None or line["step"] == args.step
    ]
    if not lines:
        raise RunError(
            f"{stage.path / 'data.jsonl'} tells of no step"
            + ("" if args.step is None else f" {args.step} that led to the latest weights")
        )
    loader = PackLoader(load_stage(stage.config_path), split="train", rank=0, size=1)
    try:
        for line in lines:
            first, end = line["packs"]
            packs = {
                number: [loader.identify(sample) for sample in loader.planned(number)]
                for number in range(first, end)
            }
            if digest_of(one for pack in packs.values() for one in pack) != line["ids"]:
                print(
                    f"step {line['step']}: the plan gives other samples than were used; the data "
                    f"under {stage.config_path} has been prepared anew since",
                    file=sys.stderr,
                )
                return exit_codes.FOUND
            for number, pack in packs.items():
                for source, key, epoch in pack:
                    record = {"step": line["step"], "pack": number, "source": source}
                    print(json.dumps(record | {"key": key, "epoch": epoch}))
    finally:
        loader.close()
    return exit_codes.OK
