"""Line charts as SVG text, for a page that needs nothing but itself.

A chart is a row of panels, one a stage, with one y axis and an x axis each: stages train on
different data, so no line runs from one into the next. A panel's width grows with the root of its
steps, so that a short stage beside a long one can still be read.

Colours come from the page's style sheet by class name, so that the charts follow light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM, _GAP = 52.0, 6.0, 44.0, 22.0, 8.0


@dataclass(frozen=True)
class Series:
    """One line of a panel. Points whose y is not finite leave a gap."""

    name: str
    style: str
    """Class of the page's style sheet: raw, smooth, eval."""
    points: Sequence[Point]
    dots: bool = False
    """Mark each point, with its value as a tooltip."""


@dataclass(frozen=True)
class Panel:
    """One stage's part of a chart."""

    name: str
    steps: int
    series: Sequence[Series]


@dataclass(frozen=True)
class Chart:
    """One chart: panels side by side over one y axis."""

    title: str
    panels: Sequence[Panel]
    width: float = 1000.0
    height: float = 320.0
    narrowest: float = 62.0
    """Least width of a panel."""

    def svg(self) -> str:
        """The chart as an `<svg>` element; a note instead when there is nothing to draw."""
        every = [one for panel in self.panels for one in panel.series]
        values = [y for one in every for _, y in one.points if math.isfinite(y)]
        if not values:
            return f'<p class="quiet">{escape(self.title)}: nothing measured yet</p>'
        low, high = _padded(min(values), max(values))
        needed = _LEFT + _RIGHT + (self.narrowest + _GAP) * len(self.panels)
        width = max(self.width, needed)
        parts = [
            f'<svg viewBox="0 0 {width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}">',
            f'<text class="title" x="0" y="13">{escape(self.title)}</text>',
            *_legend(every, width),
        ]
        for index, (panel, left, size) in enumerate(self._places(width)):
            scale = _Scale(panel.steps, low, high, left, left + size, self.height)
            parts += _frame(panel, scale, labelled=index == 0)
            parts += [mark for one in panel.series for mark in _series_marks(one, scale)]
        return "\n".join([*parts, "</svg>"])

    def _places(self, width: float) -> list[tuple[Panel, float, float]]:
        """Each panel with its left edge and width."""
        free = width - _LEFT - _RIGHT - _GAP * (len(self.panels) - 1)
        spare = free - self.narrowest * len(self.panels)
        roots = [math.sqrt(panel.steps) for panel in self.panels]
        places, left = [], _LEFT
        for panel, root in zip(self.panels, roots, strict=True):
            size = self.narrowest + spare * root / sum(roots)
            places.append((panel, left, size))
            left += size + _GAP
        return places


def smooth(points: Sequence[Point]) -> list[Point]:
    """An exponential moving average of y, unbiased at its start; gaps are left out.

    It looks back over about a twelfth of the points, so that it follows a short curve too.
    """
    weight = min(0.98, 1.0 - 1.0 / max(2.0, len(points) / 12))
    average, mass, result = 0.0, 0.0, []
    for x, y in points:
        if not math.isfinite(y):
            continue
        average = weight * average + (1 - weight) * y
        mass = weight * mass + (1 - weight)
        result.append((x, average / mass))
    return result


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) from low to high."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def number(value: float) -> str:
    """A tick's label: short, with a unit for thousands and millions."""
    if value == 0:
        return "0"
    if abs(value) < 1e-2:
        return f"{value:.0e}".replace("e-0", "e-")
    for unit, size in (("M", 1e6), ("K", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


@dataclass(frozen=True)
class _Scale:
    """From a panel's values to places on the page; x runs from 0 to the steps of the stage."""

    steps: int
    y_low: float
    y_high: float
    left: float
    right: float
    height: float

    def x(self, value: float) -> float:
        inset = 6.0
        share = value / max(self.steps, 1)
        return self.left + inset + share * (self.right - self.left - 2 * inset)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - margin
    return (0.0 if low >= 0 > bottom else bottom), high + margin


def _frame(panel: Panel, scale: _Scale, *, labelled: bool) -> list[str]:
    """A panel's ground, grid, name and ticks; `labelled` adds the numbers of the y axis."""
    bottom, middle = scale.height - _BOTTOM, (scale.left + scale.right) / 2
    marks = [
        f'<rect class="panel" x="{scale.left:.1f}" y="{_TOP:g}" rx="3" '
        f'width="{scale.right - scale.left:.1f}" height="{bottom - _TOP:.1f}"/>',
        f'<text class="name" x="{middle:.1f}" y="{_TOP - 5:g}">{escape(panel.name)}</text>',
    ]
    for value in ticks(scale.y_low, scale.y_high, 5 if scale.height > 250 else 4):
        y = scale.y(value)
        marks.append(
            f'<line class="grid" x1="{scale.left:.1f}" x2="{scale.right:.1f}" '
            f'y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        if labelled:
            label = f'<text class="y" x="{_LEFT - 6:g}" y="{y + 4:.1f}">{number(value)}</text>'
            marks.append(label)
    y = bottom + 15
    marks.append(f'<text class="x" x="{scale.x(panel.steps):.1f}" y="{y:g}">{panel.steps:g}</text>')
    if scale.right - scale.left > 110:
        marks.append(f'<text class="x" x="{scale.x(0):.1f}" y="{y:g}">0</text>')
    return marks


def _series_marks(series: Series, scale: _Scale) -> list[str]:
    marks, run = [], list[str]()
    for x, y in [*series.points, (0.0, math.nan)]:
        if math.isfinite(y):
            run.append(f"{scale.x(x):.1f},{scale.y(y):.1f}")
        elif run:
            marks.append(f'<polyline class="{series.style}" points="{" ".join(run)}"/>')
            run = []
    if series.dots:
        marks += [
            f'<circle class="{series.style}" cx="{scale.x(x):.1f}" cy="{scale.y(y):.1f}" r="3.5">'
            f"<title>{escape(series.name)} at step {x:g}: {y:.4g}</title></circle>"
            for x, y in series.points
            if math.isfinite(y)
        ]
    return marks


def _legend(series: Sequence[Series], width: float) -> list[str]:
    """A key for charts whose panels hold more than one line."""
    styles = {one.name: one.style for one in series}
    if len(styles) < 2:
        return []
    marks, x = [], width - _RIGHT
    for name, style in reversed(styles.items()):
        x -= 6.2 * len(name) + 4
        marks.append(f'<text class="key" x="{x:.1f}" y="13">{escape(name)}</text>')
        x -= 22
        marks.append(f'<line class="{style}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="9" y2="9"/>')
        x -= 14
    return marks
