"""`mvl report`: one page about a run, in one file that needs no network.

Everything on it is read from the run folder, so a run that is half way gives half a page. The
numbers are those of `metrics.jsonl` and the receipts; nothing is computed a second way.
"""

import base64
import json
import mimetypes
from argparse import Namespace
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2

from launch import exit_codes
from launch.charts import Band, Chart, Point, Series, smooth
from launch.status import StageStatus, overall, run_status
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import flatten, load_stage
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.metrics import eval_lines, read_metrics, step_lines
from megatron_vl.run.receipt import now

_SMALL = {"width": 440.0, "height": 190.0}


@dataclass(frozen=True)
class Curves:
    """The measurements of all stages on one axis: steps since the start of the run."""

    bands: list[Band]
    steps: list[tuple[float, dict[str, Any]]]
    evals: dict[str, list[Point]]

    def points(self, key: str) -> list[Point]:
        """One measurement of every step that has it."""
        return [(x, float(line[key])) for x, line in self.steps if line.get(key) is not None]


def main(args: Namespace) -> int:
    """Write RUN/report.html."""
    run = RunFolder(args.run)
    path = run.path / "report.html"
    atomic.write_text(path, render(run))
    print(f"wrote {path}")
    return exit_codes.OK


def render(run: RunFolder) -> str:
    """The page. Raises RunError for a folder that is no run."""
    stages = run_status(run)
    curves = _curves(run)
    receipts = {stage.name: stage.receipt() for stage in run.stages()}
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("report.html.jinja").render(
        run=run.name,
        plan=run.plan(),
        written=now(),
        overall=overall(stages),
        summary=_summary(stages, curves, receipts),
        stages=[
            {"status": stage, "receipt": receipts[stage.stage], "cells": _cells(stage)}
            for stage in stages
        ],
        receipts={
            name: json.dumps(asdict(receipt), indent=2, ensure_ascii=False)
            for name, receipt in receipts.items()
            if receipt is not None
        },
        loss=_loss_chart(curves).svg(),
        small=[chart.svg() for chart in _small_charts(curves)],
        answers=_answers(run),
        settings=_settings(run),
    )


def _curves(run: RunFolder) -> Curves:
    """The measurements of all stages, each stage's steps after those of the ones before."""
    curves = Curves([], [], {})
    start = 0.0
    for stage in run.stages():
        records = read_metrics(stage.metrics_path)
        if not records:
            continue
        for line in step_lines(records):
            curves.steps.append((start + line["step"], line))
        for line in eval_lines(records):
            name = f"held-out {line['eval']}"
            curves.evals.setdefault(name, []).append((start + line["step"], float(line["loss"])))
        end = start + max(line["step"] for line in records)
        curves.bands.append(Band(stage.name, start, end))
        start = end
    return curves


def _loss_chart(curves: Curves) -> Chart:
    points = curves.points("loss")
    series = [Series("training, each step", "raw", points)]
    smoothed = []
    for band in curves.bands:
        inside = [(x, y) for x, y in points if band.start < x <= band.end]
        smoothed += [*smooth(inside), (band.end, float("nan"))]
    series.append(Series("training, averaged", "smooth", smoothed))
    series += [Series(name, "eval", line, dots=True) for name, line in curves.evals.items()]
    return Chart("loss by step of the run", series, curves.bands, height=340.0)


def _small_charts(curves: Curves) -> list[Chart]:
    wanted = {
        "lr": "learning rate",
        "grad_norm": "gradient norm",
        "tokens_per_s": "tokens per second",
        "tflops": "TFLOP/s",
    }
    return [
        Chart(title, [Series(title, "smooth", curves.points(key))], curves.bands, **_SMALL)
        for key, title in wanted.items()
    ]


def _summary(
    stages: list[StageStatus], curves: Curves, receipts: dict[str, Any]
) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    done = sum(stage.status == "done" for stage in stages)
    losses = curves.points("loss")
    spent = [receipt.seconds for receipt in receipts.values() if receipt is not None]
    useful, lost = sum(s.useful for s in spent), sum(s.lost for s in spent)
    figures = [("stages done", f"{done} of {len(stages)}"), ("steps", f"{len(curves.steps):,}")]
    figures.append(("tokens", f"{sum(y for _, y in curves.points('tokens')):,.0f}"))
    figures.append(("last loss", f"{losses[-1][1]:.3f}" if losses else "-"))
    figures.append(("useful time", f"{useful / 60:.1f} min"))
    figures.append(("lost time", f"{lost / 60:.1f} min"))
    return figures


def _cells(stage: StageStatus) -> list[str]:
    """A stage's numbers as the table shows them."""
    return [
        str(stage.attempt or "-"),
        f"{stage.step}/{stage.steps}",
        "-" if stage.loss is None else f"{stage.loss:.4f}",
        "-" if stage.eval_loss is None else f"{stage.eval_loss:.4f}",
        "-" if stage.tokens_per_s is None else f"{stage.tokens_per_s:,.0f}",
    ]


def _answers(run: RunFolder) -> list[dict[str, Any]]:
    """What the model answered, from `generate.jsonl`: {image, prompt, answer, reference}."""
    path = run.path / "generate.jsonl"
    if not path.exists():
        return []
    answers = []
    for line in path.read_text(encoding="utf-8").splitlines():
        record = {"image": None, "prompt": "", "answer": "", "reference": None, **json.loads(line)}
        record["picture"] = _embedded(run, record["image"]) if record["image"] else None
        answers.append(record)
    return answers


def _embedded(run: RunFolder, name: str) -> str | None:
    """A picture as a data URL; its path counts from the run folder or the working directory."""
    for path in (run.path / name, Path(name)):
        if path.is_file():
            kind = mimetypes.guess_type(path.name)[0] or "image/png"
            return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"
    return None


def _settings(run: RunFolder) -> dict[str, Any]:
    """The settings in which the stages differ, and those they share, by dotted key."""
    values: dict[str, dict[str, Any]] = {}
    for stage in run.stages():
        if stage.config_path.exists():
            try:
                values[stage.name] = flatten(load_stage(stage.config_path))
            except ConfigError:
                continue  # written by another version; the receipts still tell its story
    first = next(iter(values.values()), {})
    same = {
        key: value for key, value in first.items() if all(v[key] == value for v in values.values())
    }
    differing = {key: [v[key] for v in values.values()] for key in first if key not in same}
    return {"stages": list(values), "differing": differing, "same": same}
