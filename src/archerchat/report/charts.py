"""Draw charts as SVG with matplotlib: curves with bands, points, and bars with intervals.

Text stays text, colours follow the reader's light or dark scheme, and pointing at a value shows it
without a script. Only drawing imports matplotlib, which takes a second.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

MAX_VALUES = 48
"""Most points of a curve that show their value under the pointer."""
STYLE = Path(__file__).with_name("charts.mplstyle")
CSS = """<style>svg.chart{color-scheme:light dark}
.chart text{font-family:system-ui,sans-serif!important}
.value use{opacity:0}.value:hover use{opacity:1}
@media(prefers-color-scheme:dark){.chart>g{filter:invert(1) hue-rotate(180deg)}}</style>"""
LOOKS: dict[str, dict[str, Any]] = {
    "curve": {"lw": 1.8},
    "faint": {"lw": 0.8, "alpha": 0.4},
    "dashed": {"lw": 1.5, "ls": (0, (4, 3))},
    "dots": {"ls": "", "marker": "o", "ms": 6, "mew": 0},
    "values": {"ls": "", "marker": "o", "ms": 8, "mew": 0},
}


@dataclass(frozen=True)
class Series:
    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), by x; points that are not finite are left out."""
    kind: Literal["curve", "faint", "dashed", "dots"] = "curve"
    """`faint` is a curve behind the others. A curve of one point is drawn as a dot."""
    color: int = 0
    on_right: bool = False
    """Whether the curve is drawn against an axis of its own, on the right."""
    band: Sequence[tuple[float, float, float]] = ()
    """An interval around the curve: (x, low, high), by x."""


@dataclass(frozen=True)
class Lines:
    """Curves over a common axis."""

    title: str
    x_label: str
    series: Sequence[Series]
    y_label: str = ""
    right_label: str = ""
    right_scale: float | None = None
    """Factor from the left axis to the right one, if both are for the same curve."""
    log_x: bool = False
    log_y: bool = False
    from_zero: bool = False


@dataclass(frozen=True)
class Bars:
    """Horizontal bars from zero, the first on top."""

    title: str
    bars: Sequence[tuple[str, float, tuple[float, float], str]]
    """Label, value, interval, and the text next to the bar."""


def compact(value: float, digits: int = 3) -> str:
    """Write a number in a few characters: 1.5k, 0.012, 2.5M."""
    for unit, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if 1e15 > abs(value) >= unit * (1 - 0.5 * 10.0**-digits):
            return f"{value / unit:.{digits}g}{suffix}"
    return f"{value:.{digits}g}"


def draw(chart: Lines | Bars) -> str:
    """Return a chart as a deterministic `<svg>` element."""
    import matplotlib
    from matplotlib.figure import Figure

    width, height = (420, 55 + 20 * len(chart.bars)) if isinstance(chart, Bars) else (340, 215)
    with matplotlib.rc_context(fname=STYLE):
        figure, file = Figure(figsize=(width / 72, height / 72)), io.StringIO()
        axes = figure.add_subplot()
        axes.set_title(chart.title)
        values = _draw_bars(axes, chart) if isinstance(chart, Bars) else _draw_lines(axes, chart)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    texts = iter(values)

    def titled(marker: re.Match[str]) -> str:
        return f'<g class="value"><title>{escape(next(texts))}</title>{marker[0]}</g>'

    content = re.sub(
        r'<g id="values.*?</g>\s*</g>',
        lambda group: re.sub(r"<use [^>]*/>", titled, group[0]),
        file.getvalue().partition("<defs>")[2],
        flags=re.DOTALL,
    )
    return (
        f'<svg class="chart" role="img" aria-label="{escape(chart.title)}" '
        f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="0 0 {width} {height}">{CSS}<defs>{content}'
    )


def _draw_lines(axes: Any, chart: Lines) -> list[str]:
    """Draw curves; return the texts of the points that show their value."""
    sides: list[Any] = [axes]
    if scale := chart.right_scale:
        sides.append(axes.secondary_yaxis("right", (lambda y: y * scale, lambda y: y / scale)))
    elif chart.right_label:
        sides.append(axes.twinx())
    if chart.log_x:
        axes.set_xscale("log")
    for side in sides if chart.log_y else ():
        side.set_yscale("log")
    named: list[Any] = []
    values: list[str] = []
    for i, series in enumerate(chart.series):
        side, color = sides[series.on_right], f"C{series.color % 6}"
        points = [point for point in series.points if all(map(math.isfinite, point))]
        xs, ys = [x for x, _ in points], [y for _, y in points]
        look = LOOKS["dots" if len(points) == 1 else series.kind]
        lines = side.plot(xs, ys, color=color, label=series.label, **look)
        named += lines if series.label else []
        if chart.log_y and series.on_right and len(points) == 1:  # matplotlib shows two decades
            side.set_ylim(ys[0] / 1.25, ys[0] * 1.25)
        if series.band:
            side.fill_between(*zip(*series.band, strict=True), color=color, alpha=0.18, lw=0)
        if series.kind in ("curve", "dots"):
            every = slice(None, None, math.ceil(len(points) / MAX_VALUES) or 1)
            side.plot(xs[every], ys[every], color=color, gid=f"values{i}", **LOOKS["values"])
            name = f"{series.label}: " if series.label else ""
            values += [f"{name}{compact(y, 4)} at {compact(x, 6)}" for x, y in points[every]]
    if chart.from_zero:
        axes.set_ylim(bottom=0)
    _label_axes(axes, sides, chart)
    if len(named) > 1:
        axes.legend(handles=named)
    return values


def _label_axes(axes: Any, sides: Sequence[Any], chart: Lines) -> None:
    from matplotlib import ticker

    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
    if chart.log_x and high > 4 * low:
        axes.xaxis.set_major_locator(
            ticker.LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5))
        )
    for side, label in zip(sides, (chart.y_label, chart.right_label), strict=False):
        side.yaxis.set_major_locator(ticker.MaxNLocator(5))
        side.set_ylabel(label)
    for axis in (axes.xaxis, *(side.yaxis for side in sides)):
        axis.set_minor_locator(ticker.NullLocator())
        axis.set_major_formatter(lambda value, _: compact(value))
    axes.set_xlabel(chart.x_label)
    axes.grid(True, axis="y")


def _draw_bars(axes: Any, chart: Bars) -> list[str]:
    labels, values, _, _ = zip(*chart.bars, strict=True)
    rows = range(len(values))
    axes.barh(rows, values, 0.68, color=["C0" if v >= 0 else "C1" for v in values])
    for row, (_, value, interval, shown) in enumerate(chart.bars):
        axes.plot(interval, (row, row), color="#1d2025", lw=1.1, marker="|", ms=5)
        place = (max(0.0, value, interval[1]), row)
        axes.annotate(shown, place, xytext=(5, 0), textcoords="offset points", va="center")
    axes.axvline(0, color="#5f6672", lw=1)
    axes.set_yticks(rows, labels, color="#1d2025")
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.grid(True, axis="x")
    return []
