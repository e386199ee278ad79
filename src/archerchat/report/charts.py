"""Draw charts as SVG text: curves, points and bars, in colours that the page's style gives.

Written here instead of taken from a library because a report must open offline, follow the
reader's light or dark scheme, and stay small: an SVG whose classes the page's style colours does
all three in a few kilobytes, and a value shows under the pointer without any script.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from archerchat.report.scales import Scale, build_scale, compact

WIDTH, HEIGHT = 320, 200
"""As wide as it is shown where several stand side by side, so that its text has its own size."""
LEFT, RIGHT, TOP, BOTTOM = 44, 8, 22, 36
MOST_POINTS = 300
"""Of a curve; more than a chart has room for are thinned, its extremes kept."""
HOVER_SLICES = 48
BAR_WIDTH, BAR_HEIGHT, BAR_LABEL, BAR_VALUE = 400, 22, 150, 50

STYLE = """
.chart{display:block;width:100%;height:auto;overflow:visible}
.chart text{font:11px system-ui,sans-serif;fill:var(--muted)}
.chart .grid{stroke:var(--line);stroke-width:1}
.chart .zero{stroke:var(--muted);stroke-width:1}
.chart .mark{stroke:var(--muted);stroke-width:1;stroke-dasharray:4 3}
.chart .curve{fill:none;stroke-width:1.8;stroke-linejoin:round}
.chart .dashed{stroke-dasharray:5 4}
.chart .faint{stroke-width:1;opacity:.35}
.chart .hover{opacity:0;pointer-events:none}
.chart g:hover>.hover{opacity:1}
.chart .rule{stroke:var(--muted);stroke-width:1}
.chart text.value{fill:var(--text);font-weight:600}
.chart text.label{fill:var(--text)}
.chart .s0{stroke:var(--c0)}.chart .f0{fill:var(--c0)}
.chart .s1{stroke:var(--c1)}.chart .f1{fill:var(--c1)}
.chart .s2{stroke:var(--c2)}.chart .f2{fill:var(--c2)}
.chart .s3{stroke:var(--c3)}.chart .f3{fill:var(--c3)}
.chart .s4{stroke:var(--c4)}.chart .f4{fill:var(--c4)}
.chart .s5{stroke:var(--c5)}.chart .f5{fill:var(--c5)}
"""
COLORS = """
:root{color-scheme:light dark;--page:#fbfaf8;--card:#fff;--text:#1d2025;--muted:#5f6672;
--line:#e4e2dd;--c0:#2356c9;--c1:#c2500f;--c2:#2a7d46;--c3:#8440b3;--c4:#1c7a86;
--c5:#96700b}
@media(prefers-color-scheme:dark){:root{--page:#14161a;--card:#1c1f25;--text:#e8e9ec;
--muted:#9aa2af;--line:#31353d;--c0:#7fa7ff;--c1:#ff9f66;--c2:#74cf8f;--c3:#c79bf0;--c4:#66c9d4;--c5:#e5c158}}
"""
PALETTE = 6


@dataclass(frozen=True)
class Series:
    """Points of a chart, joined by a curve or each for itself."""

    label: str
    points: Sequence[tuple[float, float]]
    """(x, y), by x; those that are not finite are left out."""
    color: int = 0
    kind: str = "curve"
    """`curve`, `dashed`, `faint` (a curve behind the others, without a label) or `dots`."""


@dataclass(frozen=True)
class LineChart:
    """Curves over a common axis."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    log_x: bool = False
    log_y: bool = False
    percent: bool = False
    """Whether values are shares, to be shown in per cent."""
    trim: bool = False
    """Let the first twentieth of the curves run off the plot, so that the rest can be seen."""
    from_zero: bool = False


@dataclass(frozen=True)
class Bar:
    label: str
    value: float
    shown: str
    """What stands beside it."""
    note: str
    """What is told under the pointer."""


@dataclass(frozen=True)
class BarChart:
    """Horizontal bars from zero."""

    title: str
    bars: tuple[Bar, ...]


Chart = LineChart | BarChart


def draw(chart: Chart) -> str:
    """Return a chart as an `<svg>` element; every text in it is escaped."""
    return _draw_bars(chart) if isinstance(chart, BarChart) else _draw_lines(chart)


def standalone(chart: Chart) -> str:
    """Return a chart as a file of its own, in light and dark."""
    head = f"<style>{COLORS}{STYLE}.back{{fill:var(--card)}}</style>"
    back = '<rect class="back" width="100%" height="100%"/>'
    drawn = draw(chart)
    start = drawn.index(">") + 1
    return drawn[:start] + head + back + drawn[start:] + "\n"


def _open(width: float, height: float, title: str) -> str:
    return (
        f'<svg class="chart" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'role="img" aria-label="{escape(title)}">'
    )


def _draw_lines(chart: LineChart) -> str:
    series = [(each, _finite(each.points, chart)) for each in chart.series]
    series = [(each, points) for each, points in series if points]
    if not series:
        return _open(WIDTH, HEIGHT, chart.title) + "</svg>"
    xs = [x for _, points in series for x, _ in points]
    ys = [y for _, points in series for _, y in points]
    if chart.trim:
        later = [(each.kind, [y for _, y in p[len(p) // 20 :]]) for each, p in series]
        ys = [y for kind, values in later if kind != "faint" for y in values]
        ys += [min(values) for _, values in later]  # a step's loss may spike, but not downwards
    if chart.from_zero:
        ys = [0.0, *ys]
    x = build_scale(xs, LEFT, WIDTH - RIGHT, log=chart.log_x, pad=0.03 * chart.log_x)
    y = build_scale(ys, HEIGHT - BOTTOM, TOP, log=chart.log_y, pad=0.08)
    parts = [_open(WIDTH, HEIGHT, chart.title), _axes(chart, x, y)]
    plot = f'x="0" y="{TOP - 8}" width="{WIDTH}" height="{HEIGHT - BOTTOM - TOP + 8}"'
    box = f'viewBox="0 {TOP - 8} {WIDTH} {HEIGHT - BOTTOM - TOP + 8}"'
    parts.append(f"<svg {plot} {box}>")  # what runs off the top ends at its edge
    for each, points in sorted(series, key=lambda pair: pair[0].kind != "faint"):
        parts.append(_draw_series(each, points, x, y))
    parts.append("</svg>")
    named = [(each, points) for each, points in series if each.kind != "faint"]
    if len([each for each, _ in named if each.label]) > 1:
        parts.append(_legend([each for each, _ in named]))
    parts += [_hover(each, points, x, y, chart) for each, points in named if each.kind != "dashed"]
    return "".join([*parts, "</svg>"])


def _finite(points: Sequence[tuple[float, float]], chart: LineChart) -> list[tuple[float, float]]:
    return [
        (x, y)
        for x, y in points
        if math.isfinite(x)
        and math.isfinite(y)
        and (x > 0 or not chart.log_x)
        and (y > 0 or not chart.log_y)
    ]


def _axes(chart: LineChart, x: Scale, y: Scale) -> str:
    bottom, parts = HEIGHT - BOTTOM, []
    for tick in y.ticks:
        place = y.place(tick)
        parts.append(
            f'<path class="grid" d="M{LEFT} {place:.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{place + 4:.1f}" text-anchor="end">'
            f"{_shown(tick, chart)}</text>"
        )
    for tick in x.ticks:
        parts.append(
            f'<text x="{x.place(tick):.1f}" y="{bottom + 15}" text-anchor="middle">'
            f"{compact(tick)}</text>"
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(
        f'<text x="{middle:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(chart.x_label)}'
        "</text>"
    )
    return "".join(parts)


def _draw_series(series: Series, points: Sequence[tuple[float, float]], x: Scale, y: Scale) -> str:
    color = series.color % PALETTE
    if series.kind == "dots":
        return "".join(
            f'<circle class="f{color}" cx="{x.place(a):.1f}" cy="{y.place(b):.1f}" r="3.5"/>'
            for a, b in points
        )
    path = "L".join(f"{x.place(a):.1f} {y.place(b):.1f}" for a, b in _thinned(points))
    extra = "" if series.kind == "curve" else f" {series.kind}"
    return f'<path class="curve s{color}{extra}" d="M{path}"/>'


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the lowest and the highest point of each of so many stretches, and both ends."""
    if len(points) <= MOST_POINTS:
        return list(points)
    kept = {0, len(points) - 1}
    stretches = MOST_POINTS // 2
    for i in range(stretches):
        part = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        kept |= {min(part, key=lambda j: points[j][1]), max(part, key=lambda j: points[j][1])}
    return [points[j] for j in sorted(kept)]


def _legend(series: Sequence[Series]) -> str:
    parts, place = [], float(LEFT)
    for each in series:
        if not each.label:
            continue
        parts.append(
            f'<circle class="f{each.color % PALETTE}" cx="{place + 4:.0f}" cy="8" r="4"/>'
            f'<text x="{place + 12:.0f}" y="12">{escape(each.label)}</text>'
        )
        place += 22 + 6.0 * len(each.label)
    return "".join(parts)


def _hover(
    series: Series, points: Sequence[tuple[float, float]], x: Scale, y: Scale, chart: LineChart
) -> str:
    """Cut the plot into stretches that show a point of the curve each."""
    count = min(HOVER_SLICES, len(points))
    chosen = [points[round(i * (len(points) - 1) / max(1, count - 1))] for i in range(count)]
    places = [x.place(a) for a, _ in chosen]
    parts = []
    for i, (a, b) in enumerate(chosen):
        left = LEFT if i == 0 else (places[i - 1] + places[i]) / 2
        right = WIDTH - RIGHT if i == count - 1 else (places[i] + places[i + 1]) / 2
        dot = max(float(TOP), min(y.place(b), float(HEIGHT - BOTTOM)))
        # Several curves share the plot: each takes the pointer near its own.
        top, tall = (TOP, HEIGHT - BOTTOM - TOP) if len(chart.series) < 3 else (dot - 9, 18)
        value = f"{_shown(b, chart, 4)} at {compact(a, 6)}"
        label = f"{series.label}: {value}" if len(chart.series) > 2 else value
        end = places[i] > WIDTH * 0.6
        parts.append(
            f'<g><rect x="{left:.1f}" y="{top:.1f}" width="{max(0.1, right - left):.1f}" '
            f'height="{tall:.1f}" fill="transparent"/>'
            f'<path class="rule hover" d="M{places[i]:.1f} {TOP}V{HEIGHT - BOTTOM}"/>'
            f'<circle class="f{series.color % PALETTE} hover" cx="{places[i]:.1f}" '
            f'cy="{dot:.1f}" r="3.5"/><text class="value hover" x="'
            f'{places[i] + (-7 if end else 7):.1f}" y="{TOP + 4}" '
            f'text-anchor="{"end" if end else "start"}">{escape(label)}</text></g>'
        )
    return "".join(parts)


def _shown(value: float, chart: LineChart, digits: int = 3) -> str:
    return f"{compact(100 * value, digits)} %" if chart.percent else compact(value, digits)


def _draw_bars(chart: BarChart) -> str:
    height = BAR_HEIGHT * len(chart.bars) + 26
    low = min([0.0, *(bar.value for bar in chart.bars)])
    high = max([0.0, *(bar.value for bar in chart.bars)])
    scale = build_scale([low, high], BAR_LABEL, BAR_WIDTH - BAR_VALUE)
    parts, bottom = [_open(BAR_WIDTH, height, chart.title)], height - 20
    for tick in scale.ticks:
        place = scale.place(tick)
        parts.append(
            f'<path class="grid" d="M{place:.1f} 0V{bottom}"/><text x="{place:.1f}" '
            f'y="{bottom + 14}" text-anchor="middle">{compact(tick)}</text>'
        )
    zero = scale.place(0.0)
    for row, bar in enumerate(chart.bars):
        end, top = scale.place(bar.value), row * BAR_HEIGHT + 4
        parts.append(
            f'<g><title>{escape(bar.note)}</title><text class="label" x="{BAR_LABEL - 8}" '
            f'y="{top + 12}" text-anchor="end">{escape(_shortened(bar.label))}</text>'
            f'<rect class="f{0 if bar.value >= 0 else 1}" x="{min(zero, end):.1f}" y="{top}" '
            f'width="{max(1.0, abs(end - zero)):.1f}" height="{BAR_HEIGHT - 7}" rx="2"/>'
            f'<text x="{max(zero, end) + 5:.1f}" y="{top + 12}">{escape(bar.shown)}</text></g>'
        )
    parts.append(f'<path class="zero" d="M{zero:.1f} 0V{bottom}"/></svg>')
    return "".join(parts)


def _shortened(label: str, most: int = 25) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"
