"""Charts as SVG: well-formed, escaped, to scale."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from archerchat.report.charts import Bar, BarChart, LineChart, Series, draw, standalone
from archerchat.report.scales import build_scale, compact, linear_ticks, log_ticks

HOSTILE = '</title><script>alert("x")</script>&'


def numbers(path: str) -> list[tuple[float, float]]:
    return [(float(a), float(b)) for a, b in re.findall(r"([\d.]+) ([\d.]+)", path)]


def curve(chart: LineChart) -> list[tuple[float, float]]:
    root = ElementTree.fromstring(draw(chart))
    return next(numbers(e.get("d", "")) for e in root.iter() if "curve" in e.get("class", ""))


def test_a_curve_is_drawn_to_scale() -> None:
    places = curve(LineChart("t", "step", (Series("a", [(0, 1), (10, 3), (20, 2)]),)))
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2)
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.2)  # downwards is smaller
    assert y1 < y2 < y0


def test_long_curves_keep_their_extremes() -> None:
    points = [(float(i), math.sin(i / 900)) for i in range(20_000)]
    points[7_777] = (7_777.0, 9.0)
    places = curve(LineChart("t", "step", (Series("a", points),)))
    assert len(places) < 400
    assert min(y for _, y in places) < sorted(y for _, y in places)[1] - 20


def test_what_cannot_be_drawn_is_left_out() -> None:
    points = [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 1.0), (-1.0, 0.5)]
    assert len(curve(LineChart("t", "x", (Series("a", points),), log_x=True))) == 2
    ElementTree.fromstring(draw(LineChart("t", "x", (Series("a", [(0, math.nan)]),))))
    ElementTree.fromstring(draw(LineChart("t", "x", (Series("a", [(5, 5)]),))))


@pytest.mark.parametrize("as_file", [False, True])
def test_texts_cannot_become_markup(as_file: bool) -> None:
    lines = LineChart(HOSTILE, HOSTILE, (Series(HOSTILE, [(0, 1), (1, 2)]), Series("b", [(0, 1)])))
    bars = BarChart(HOSTILE, (Bar(HOSTILE, 0.5, HOSTILE, HOSTILE), Bar("b", -0.1, "", "")))
    for chart in (lines, bars):
        text = standalone(chart) if as_file else draw(chart)
        assert "<script" not in text
        root = ElementTree.fromstring(text)
        assert root.get("aria-label") == HOSTILE


def test_bars_start_at_zero_and_go_both_ways() -> None:
    root = ElementTree.fromstring(
        draw(BarChart("t", (Bar("a", 0.5, "", ""), Bar("b", -0.25, "", ""))))
    )
    first, second = (e for e in root.iter() if e.tag.endswith("rect"))
    zero = float(first.get("x", ""))
    assert float(second.get("x", "")) + float(second.get("width", "")) == pytest.approx(zero, abs=1)
    ratio = float(first.get("width", "")) / float(second.get("width", ""))
    assert ratio == pytest.approx(2, abs=0.05)


def test_scales() -> None:
    assert linear_ticks(0, 10) == (0, 2, 4, 6, 8, 10)
    assert linear_ticks(0.93, 1.07) == pytest.approx((0.95, 1.0, 1.05))
    assert log_ticks(1, 1e5) == (1, 10, 100, 1e3, 1e4, 1e5)
    assert log_ticks(1, 10) == (1, 2, 5, 10)
    scale = build_scale([1, 100], 0, 10, log=True)
    assert scale.place(10) == pytest.approx(5)
    flat = build_scale([3.0, 3.0], 0, 10)
    assert flat.place(3.0) == pytest.approx(5)
    assert build_scale([0.0], 0, 10).place(0.0) == pytest.approx(5)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1.23k"),
        (999_960, "1M"),
        (0.00012, "0.00012"),
        (-2.5e9, "-2.5G"),
        (12, "12"),
    ],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text
