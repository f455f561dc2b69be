"""The golden curves of the laptop recipe and what every layout differs by, as committed files.

    make golden                                  # trains the recipe, then writes docs/golden/
    python bench/golden.py runs/golden           # the same from a finished run
    python bench/golden.py runs/golden --only curves

    curves.csv     every training loss of every stage
    held_out.csv   what each stage left on every stage's held-out set, by source and modality
    parity.csv     `mvl check` of stage 1 at each layout: largest relative differences from one rank
    prefix.json    losses of the first steps of stage 1 from drawn weights on made-up packs

Curves follow from the text of the Python installation that the laptop's data is built from, so
another Python gives other curves; `data` in prefix.json names the plan of packs they belong to. The
prefix depends on nothing but the code: a test trains it again.
"""

import argparse
import csv
import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_vl.config.load import load_stage
from megatron_vl.config.schema import StageConfig
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import read_metrics, set_lines, step_lines

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "docs" / "golden"
STAGE = ROOT / "stages" / "laptop" / "stage1.yaml"
STEPS = 3
LAYOUTS = (
    "tensor=2",
    "tensor=2 sequence=true",
    "pipeline=2",
    "context=2",
    "data=2",
    "tensor=2 pipeline=2",
    "tensor=2 context=2",
    "pipeline=2 context=2",
)


def prefix_stage() -> StageConfig:
    """Stage 1 on one rank, with packs short enough for a test."""
    overrides = ["parallel.data=1", "train.global_batch=2", "data.sequence_length=384"]
    return load_stage(STAGE, overrides)


def prefix(steps: int = STEPS) -> list[float]:
    """Losses of the first steps from drawn weights on made-up packs, in this process."""
    import torch

    from megatron_vl.infer.model import empty_model
    from megatron_vl.model.initialize import initialize
    from megatron_vl.train.build import prepare_training
    from megatron_vl.train.step import count, train_step
    from megatron_vl.train.synthetic import synthetic_packs

    config, threads = prefix_stage(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with empty_model(config) as (module, groups):
            initialize(module, groups, config.model, config.train.seed)
            trainee = prepare_training(module, config, groups)
            losses = []
            for step in range(steps):
                packs = synthetic_packs(config, step)
                counts = count(packs, trainee)
                losses.append(train_step(packs, counts, trainee, config, 1e-3).loss)
    finally:
        torch.set_num_threads(threads)
    return losses


def parity(layout: str) -> dict[str, Any]:
    """What a layout differs by from one rank: the largest of losses, layers and gradients."""
    axes = [f"parallel.{axis}" for axis in layout.split()]
    words = ["check", str(STAGE), "--json", "parallel.data=1", *axes]
    words += ["data.document_alignment=4"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], cwd=ROOT, text=True, capture_output=True,
        timeout=600, check=False,
    )  # fmt: skip
    if not done.stdout.strip():
        raise SystemExit(f"mvl {' '.join(words)} ended with {done.returncode}\n{done.stderr}")
    largest = {"losses": 0.0, "layers": 0.0, "gradients": 0.0}
    found = json.loads(done.stdout)
    for finding in found["findings"]:
        kind = {"loss": "losses", "gradient": "gradients"}
        group = kind.get(finding["name"].partition(".")[0], "layers")
        largest[group] = max(largest[group], finding["difference"])
    return {"layout": layout, **{k: f"{v:.1e}" for k, v in largest.items()},
            "equal": found["equal"]}  # fmt: skip


def curves(run: RunFolder) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Training losses, held-out losses and the plan of packs of each stage of a run."""
    trained, held_out, plans = [], [], {}
    for stage in run.stages():
        receipt, records = stage.receipt(), read_metrics(stage.metrics_path)
        if receipt is None or not receipt.done or not step_lines(records):
            continue
        plans[stage.name] = receipt.metrics["data/plan"]
        for line in step_lines(records):
            row = {"stage": stage.name, "step": line["step"], "loss": f"{line['loss']:.6f}"}
            trained.append(row)
        for line in set_lines(records):
            losses = {("all", ""): line["loss"]}
            losses |= {("source", name): loss for name, loss in line["sources"].items()}
            losses |= {("modality", name): loss for name, loss in line["modalities"].items()}
            for (kind, name), loss in losses.items():
                row = {"after": stage.name, "set": line["eval"], "kind": kind, "name": name}
                held_out.append(row | {"loss": f"{loss:.6f}"})
    if not trained:
        raise SystemExit(f"{run.path}: no stage of it has trained to its end")
    return trained, held_out, plans


def _write(name: str, rows: Sequence[dict[str, Any]]) -> None:
    with (GOLDEN / name).open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(f"{GOLDEN / name}: {len(rows)} rows", flush=True)


def _told(layouts: Iterable[str]) -> list[dict[str, Any]]:
    rows = []
    for layout in layouts:
        rows.append(parity(layout))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a finished run of stages/laptop")
    parser.add_argument("--only", choices=("curves", "parity"), help="leave the other files")
    options = parser.parse_args()
    GOLDEN.mkdir(parents=True, exist_ok=True)
    if options.only != "parity":
        trained, held_out, plans = curves(RunFolder(options.run))
        _write("curves.csv", trained)
        _write("held_out.csv", held_out)
        losses = {"losses": prefix(), "data": plans}
        (GOLDEN / "prefix.json").write_text(json.dumps(losses, indent=1) + "\n", encoding="utf-8")
    if options.only != "curves":
        _write("parity.csv", _told(LAYOUTS))


if __name__ == "__main__":
    main()
