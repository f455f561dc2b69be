"""The page about a run: self-contained, honest about half a run, safe with any text."""

import base64
import itertools
import json
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from launch.charts import Chart, Panel, Series, number, smooth, ticks
from launch.cli import main
from launch.graph import Selection
from launch.report import render
from launch.submission import prepare
from megatron_vl.run.folder import RunFolder
from tests.launch.small_recipe import write_recipe
from tests.launch.test_chain import supervise


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    prepare(write_recipe(tmp_path / "recipe"), folder, Selection(), "local")
    return folder


def test_a_whole_run_on_one_page_without_a_network(run: RunFolder) -> None:
    supervise(run)
    (run.path / "picture.png").write_bytes(b"\x89PNG not really")
    answer = {
        "image": "picture.png",
        "prompt": "What?",
        "answer": "<b>a cat</b>",
        "reference": "cat",
    }
    (run.path / "generate.jsonl").write_text(json.dumps(answer) + "\n")
    assert main(["report", str(run.path)]) == 0
    page = (run.path / "report.html").read_text()
    assert not re.search(r"""(src|href)=["'](?!data:)|@import|url\(""", page)
    assert base64.b64encode(b"\x89PNG not really").decode() in page
    assert "&lt;b&gt;a cat&lt;/b&gt;" in page
    assert "2 of 2" in page
    assert "held-out at step 2: 1.25" in page
    for title, column, loss in (("each stage", "init", "3.500"), ("source", "qa", "1.750")):
        table = page[page.index(f"by {title}") :].partition("</table>")[0]
        assert f'<th class="n">{column}</th>' in table
        assert table.count(f"<b>{loss}</b>") == 2
    assert "goodput 73%" in page
    assert "hardware FLOP utilisation" in page
    assert "share of the pipeline schedule" not in page  # never measured
    assert "carry.weights" in page
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)
    digest = run.stage("init").receipt()
    assert digest is not None
    assert digest.checkpoint is not None
    assert digest.checkpoint.digest in page


def test_a_run_without_a_step_still_has_a_page(run: RunFolder) -> None:
    page = render(run)
    assert "0 of 2" in page
    assert "nothing measured yet" in page


def test_a_failed_run_shows_its_reason(run: RunFolder) -> None:
    supervise(run, stage0="import sys; print('<script>boom'); sys.exit(1)")
    page = render(run)
    assert "&lt;script&gt;boom" in page
    assert "1 of 2" in page


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 10.0) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(3.0, 3.0) == [3.0]
    assert [number(v) for v in (0, 1500, 2.5, 2e-4, 3e6)] == ["0", "1.5K", "2.5", "2e-4", "3M"]


def test_smoothing_starts_at_the_first_value_and_skips_gaps() -> None:
    assert smooth([(1, 4.0), (2, math.nan), (3, 4.0)]) == [
        (1, pytest.approx(4.0)),
        (3, pytest.approx(4.0)),
    ]


def test_a_chart_breaks_its_line_at_what_is_not_finite() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.inf), (4, 1.0), (5, 2.0)]
    svg = Chart("loss & more", [Panel("one", 5, [Series("a", "raw", points)])]).svg()
    assert len(re.findall("<polyline", svg)) == 2
    assert "loss &amp; more" in svg
    ElementTree.fromstring(svg)


def test_every_stage_has_a_panel_of_its_own_and_no_line_crosses() -> None:
    panels = [
        Panel(name, steps, [Series("loss", "smooth", [(1, 5.0), (steps, 1.0)])])
        for name, steps in (("init", 400), ("stage0", 4), ("stage1", 100))
    ]
    svg = ElementTree.fromstring(Chart("loss", panels).svg())
    frames = [one for one in svg.iter("rect") if one.get("class") == "panel"]
    places = [(float(frame.get("x", 0)), float(frame.get("width", 0))) for frame in frames]
    edges = [(left, left + width) for left, width in places]
    assert all(right < left for (_, right), (left, _) in itertools.pairwise(edges))
    assert edges[1][1] - edges[1][0] >= Chart("", []).narrowest
    lines = list(svg.iter("polyline"))
    assert len(lines) == 3
    for line, (left, right) in zip(lines, edges, strict=True):
        xs = [float(pair.split(",")[0]) for pair in line.get("points", "").split()]
        assert left <= min(xs) <= max(xs) <= right
    assert [one.text for one in svg.iter("text") if one.get("class") == "name"] == [
        "init",
        "stage0",
        "stage1",
    ]


def test_many_stages_widen_the_chart_instead_of_squeezing_the_panels() -> None:
    panels = [Panel(f"s{i}", 5, [Series("loss", "raw", [(1, 1.0), (5, 2.0)])]) for i in range(40)]
    svg = ElementTree.fromstring(Chart("loss", panels).svg())
    assert float(svg.get("viewBox", "").split()[2]) > 40 * 62


def test_the_page_accounts_for_the_wall_time(run: RunFolder) -> None:
    supervise(run)
    page = render(run)
    assert "Where the time went" in page
    assert page.count('<i class="useful"') == 2
    assert "loss, first \N{RIGHTWARDS ARROW} last" in page
    assert "5.0000 \N{RIGHTWARDS ARROW} 2.5000" in page
    assert re.search(r"decoder \(1\.\d+ M\)", page)
