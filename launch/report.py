"""`mvl report`: one page about a run, in one file that needs no network.

Everything on it is read from the run folder, so a run that is half way gives half a page. The
numbers are those of `metrics.jsonl`, the receipts and the journal; nothing is computed a second
way. Wall time is the journal's, from the start of a stage's first process to the end of its last.
"""

import base64
import json
import mimetypes
from argparse import Namespace
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2

from launch import exit_codes
from launch.accounting import hour_rows, print_hours, stage_hours
from launch.charts import Chart, Panel, Point, Series, smooth
from launch.held_out import held_out_tables
from launch.plan import short_count
from launch.report_gates import gate_tables, releases
from launch.status import StageStatus, overall, run_status
from launch.summary import duration, first_to_last
from megatron_vl.config.errors import ConfigError
from megatron_vl.config.load import flatten, load_stage
from megatron_vl.config.schema import Part, StageConfig
from megatron_vl.cost.parameters import model_parameters
from megatron_vl.run import atomic
from megatron_vl.run.folder import RunFolder
from megatron_vl.run.journal import wall_seconds
from megatron_vl.run.metrics import eval_lines, read_metrics, set_lines, step_lines
from megatron_vl.run.receipt import Receipt, now

_SMALL = {"width": 500.0, "height": 190.0, "narrowest": 42.0}
_MEASURES = {
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "tokens_per_s": "tokens a second",
    "tflops": "TFLOP/s on each rank",
    "mfu": "model FLOP utilisation",
    "hfu": "hardware FLOP utilisation, recompute included",
    "bubble": "share of the pipeline schedule without compute",
    "data_wait_s": "seconds a step waits for data",
}


@dataclass(frozen=True)
class Curves:
    """The measurements of one stage."""

    stage: str
    steps: int
    """Steps the stage is planned to take."""
    trained: list[dict[str, Any]]
    evaluated: list[dict[str, Any]]
    """On the stage's own held-out set."""
    sets: list[dict[str, Any]]
    """On every stage's held-out set."""

    def points(self, key: str) -> list[Point]:
        """One measurement of every step that has it."""
        lines = self.trained
        return [(line["step"], float(line[key])) for line in lines if line.get(key) is not None]

    def held_out(self) -> list[Point]:
        """The losses on the stage's own held-out set."""
        return [(line["step"], float(line["loss"])) for line in self.evaluated]


def main(args: Namespace) -> int:
    """Write RUN/report.html."""
    run = RunFolder(args.run)
    path = run.path / "report.html"
    atomic.write_text(path, render(run))
    print_hours(stage_hours(run))
    print(f"wrote {path}")
    return exit_codes.OK


def render(run: RunFolder) -> str:
    """The page. Raises RunError for a folder that is no run."""
    stages = run_status(run)
    curves = _curves(run)
    receipts = {stage.name: stage.receipt() for stage in run.stages()}
    spent = wall_seconds(run.journal.read())
    configs = _configs(run)
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined
    )
    plan = run.plan()
    return environment.get_template("report.html.jinja").render(
        run=run.name,
        plan=plan,
        planned=_moment(plan["created"]),
        written=_moment(now()),
        overall=overall(stages),
        summary=_summary(stages, curves, spent, configs),
        stages=[
            {
                "status": stage,
                "receipt": receipts[stage.stage],
                "cells": _cells(stage, curves),
                "learned": _learned(receipts[stage.stage], configs.get(stage.stage)),
            }
            for stage in stages
        ],
        times=_times(receipts, spent),
        hours=hour_rows(stage_hours(run)),
        receipts={
            name: json.dumps(asdict(receipt), indent=2, ensure_ascii=False)
            for name, receipt in receipts.items()
            if receipt is not None
        },
        loss=_loss_chart(curves).svg(),
        small=[
            Chart(title, [_panel(one, key, title) for one in curves], **_SMALL).svg()
            for key, title in _MEASURES.items()
            if any(one.points(key) for one in curves)
        ],
        held_out=held_out_tables({one.stage: one.sets for one in curves}),
        gates=gate_tables(run),
        releases=releases(run),
        answers=_answers(run),
        settings=_settings(configs),
    )


def _curves(run: RunFolder) -> list[Curves]:
    """The measurements of every stage that has any, in order."""
    totals = {entry["name"]: entry["steps"] for entry in run.plan()["stages"]}
    found = []
    for stage in run.stages():
        records = read_metrics(stage.metrics_path)
        if records:
            steps = max(totals[stage.name], records[-1]["step"])
            lines = (step_lines(records), eval_lines(records), set_lines(records))
            found.append(Curves(stage.name, steps, *lines))
    return found


def _loss_chart(curves: list[Curves]) -> Chart:
    panels = []
    for one in curves:
        points = one.points("loss")
        series = [
            Series("each step", "raw", points),
            Series("averaged", "smooth", smooth(points)),
            Series("held-out", "eval", one.held_out(), dots=True),
        ]
        panels.append(Panel(one.stage, one.steps, series))
    return Chart("training and held-out loss by step of each stage", panels, height=340.0)


def _panel(curves: Curves, key: str, title: str) -> Panel:
    return Panel(curves.stage, curves.steps, [Series(title, "smooth", curves.points(key))])


def _summary(
    stages: list[StageStatus],
    curves: list[Curves],
    spent: dict[str, float],
    configs: dict[str, StageConfig],
) -> list[tuple[str, str]]:
    """The figures at the head of the page."""
    done = sum(stage.status == "done" for stage in stages)
    tokens = sum(y for one in curves for _, y in one.points("tokens"))
    steps = sum(len(one.trained) for one in curves)
    figures = [("stages done", f"{done} of {len(stages)}"), ("steps", f"{steps:,}")]
    figures.append(("tokens trained on", short_count(int(tokens))))
    model = next(iter(configs.values())).model if configs else None
    if model is not None:
        figures.append(("parameters", short_count(model_parameters(model).total)))
    figures.append(("wall time", duration(sum(spent.values())) or "-"))
    return figures


def _cells(stage: StageStatus, curves: list[Curves]) -> list[str]:
    """A stage's numbers as the table shows them."""
    own = next((one for one in curves if one.stage == stage.stage), None)
    losses = [own.trained, own.evaluated] if own else [[], []]
    return [
        str(stage.attempt or "-"),
        f"{stage.step}/{stage.steps}" if stage.steps else stage.kind,
        *((first_to_last(lines) or "-").replace("->", "\N{RIGHTWARDS ARROW}") for lines in losses),
        "-" if stage.tokens_per_s is None else f"{stage.tokens_per_s:,.0f}",
    ]


def _learned(receipt: Receipt | None, config: StageConfig | None) -> str:
    """Which parts of the model a stage trained, and how much of it that is."""
    if receipt is None:
        return ""
    order = [part.value for part in Part]
    parts = sorted(receipt.trainable, key=lambda part: order.index(part) if part in order else 9)
    named = "all parts" if set(parts) == set(order) else ", ".join(parts)
    if config is None:
        return named
    return f"{named} ({short_count(model_parameters(config.model).of_parts(set(parts)))})"


def _times(receipts: dict[str, Receipt | None], spent: dict[str, float]) -> list[dict[str, Any]]:
    """Where each stage's wall time went; what is neither useful nor waiting is lost."""
    rows = []
    for name, told in spent.items():
        receipt = receipts.get(name)
        useful = receipt.seconds.useful if receipt else 0.0
        waiting = receipt.seconds.waiting if receipt else 0.0
        wall = max(told, useful + waiting)  # the journal tells whole seconds
        goodput = receipt.metrics.get("goodput") if receipt else None
        rows.append((name, wall, {"useful": useful, "waiting": waiting}, goodput))
    longest = max((wall for _, wall, *_ in rows), default=0.0) or 1.0
    return [
        {
            "stage": name,
            "wall": duration(wall),
            "useful": f"{parts['useful'] / wall:.0%}" if wall else "0%",
            "goodput": "" if goodput is None else f"{goodput:.0%}",
            "parts": {
                part: {"text": _seconds(seconds), "width": f"{100 * seconds / longest:.2f}"}
                for part, seconds in {**parts, "lost": wall - sum(parts.values())}.items()
            },
        }
        for name, wall, parts, goodput in rows
    ]


def _seconds(seconds: float) -> str:
    return duration(seconds) if seconds >= 10 else f"{seconds:.1f} s"


def _moment(text: str) -> str:
    """A time of the run folder as a person reads it."""
    return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M UTC")


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


def _configs(run: RunFolder) -> dict[str, StageConfig]:
    """The resolved configuration of every stage that has one."""
    found = {}
    for stage in run.stages():
        if stage.config_path.exists():
            try:
                found[stage.name] = load_stage(stage.config_path)
            except ConfigError:
                continue  # written by another version; the receipts still tell its story
    return found


def _settings(configs: dict[str, StageConfig]) -> dict[str, Any]:
    """The settings in which the stages differ, and those they share, by dotted key."""
    values = {name: flatten(config) for name, config in configs.items()}
    first = next(iter(values.values()), {})
    same = {
        key: value for key, value in first.items() if all(v[key] == value for v in values.values())
    }
    differing = {key: [v[key] for v in values.values()] for key in first if key not in same}
    differing.pop("name", None)
    return {"stages": list(values), "differing": differing, "same": same}
