"""Line charts as SVG text, for a page that needs nothing but itself.

Colours come from the page's style sheet by class name, so that the charts follow light and dark.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

Point = tuple[float, float]
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 24.0, 30.0


@dataclass(frozen=True)
class Series:
    """One line of a chart. Points whose y is not finite leave a gap."""

    name: str
    style: str
    """Class of the page's style sheet: raw, smooth, eval."""
    points: Sequence[Point]
    dots: bool = False
    """Mark each point, with its value as a tooltip."""


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis with a name: a stage."""

    name: str
    start: float
    end: float


@dataclass(frozen=True)
class Chart:
    """One chart: its lines over shared axes."""

    title: str
    series: Sequence[Series]
    bands: Sequence[Band] = field(default_factory=list)
    width: float = 900.0
    height: float = 300.0

    def svg(self) -> str:
        """The chart as an `<svg>` element; a note instead when there is nothing to draw."""
        values = [y for one in self.series for _, y in one.points if math.isfinite(y)]
        if not values:
            return f'<p class="quiet">{escape(self.title)}: nothing measured yet</p>'
        low, high = _padded(min(values), max(values))
        starts = [band.start for band in self.bands]
        ends = [band.end for band in self.bands]
        xs = [x for one in self.series for x, _ in one.points]
        scale = _Scale(min(starts + xs), max(ends + xs), low, high, self.width, self.height)
        parts = [
            f'<svg viewBox="0 0 {self.width:g} {self.height:g}" role="img" '
            f'aria-label="{escape(self.title)}">',
            *_band_marks(self.bands, scale),
            *_grid(scale),
            *(mark for one in self.series for mark in _series_marks(one, scale)),
            f'<text class="title" x="{_LEFT:g}" y="14">{escape(self.title)}</text>',
            *_legend(self.series, scale),
            "</svg>",
        ]
        return "\n".join(parts)


def smooth(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """An exponential moving average of y, unbiased at its start; gaps are left out."""
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
    """From values to places on the page."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    width: float
    height: float

    def x(self, value: float) -> float:
        share = (value - self.x_low) / ((self.x_high - self.x_low) or 1.0)
        return _LEFT + share * (self.width - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return self.height - _BOTTOM - share * (self.height - _TOP - _BOTTOM)


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    bottom = low - margin
    return (0.0 if low >= 0 > bottom else bottom), high + margin


def _band_marks(bands: Sequence[Band], scale: _Scale) -> list[str]:
    marks = []
    for index, band in enumerate(bands):
        x, width = scale.x(band.start), scale.x(band.end) - scale.x(band.start)
        height = scale.height - _TOP - _BOTTOM
        marks.append(
            f'<rect class="band{index % 2}" x="{x:.1f}" y="{_TOP:g}" width="{width:.1f}" '
            f'height="{height:.1f}"><title>{escape(band.name)}</title></rect>'
        )
        if width > 7.0 * len(band.name):
            marks.append(
                f'<text class="band" x="{x + width / 2:.1f}" y="{_TOP + 12:g}">'
                f"{escape(band.name)}</text>"
            )
    return marks


def _grid(scale: _Scale) -> list[str]:
    marks = []
    for value in ticks(scale.y_low, scale.y_high):
        y = scale.y(value)
        right = scale.width - _RIGHT
        marks.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{right:g}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        marks.append(f'<text class="y" x="{_LEFT - 6:g}" y="{y + 4:.1f}">{number(value)}</text>')
    for value in ticks(scale.x_low, scale.x_high, 6):
        y = scale.height - _BOTTOM + 16
        marks.append(f'<text class="x" x="{scale.x(value):.1f}" y="{y:g}">{number(value)}</text>')
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
            f"<title>{escape(series.name)} at {x:g}: {y:.4g}</title></circle>"
            for x, y in series.points
            if math.isfinite(y)
        ]
    return marks


def _legend(series: Sequence[Series], scale: _Scale) -> list[str]:
    if len(series) < 2:
        return []
    marks, x = [], scale.width - _RIGHT
    for one in reversed(series):
        x -= 7.0 * len(one.name) + 8
        marks.append(f'<text class="key" x="{x:.1f}" y="14">{escape(one.name)}</text>')
        x -= 22
        marks.append(f'<line class="{one.style}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="10" y2="10"/>')
        x -= 12
    return marks
