"""Charts as SVG: well-formed, escaped, to scale, the same each time."""

from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from archerchat.report.charts import Bars, Lines, Series, compact, draw

HOSTILE = "</title><script>&$x_1$"
SVG = "{http://www.w3.org/2000/svg}"


def curve(chart: Lines) -> list[tuple[float, float]]:
    """Return the places of the first curve's points."""
    root = ElementTree.fromstring(draw(chart))
    paths = (e for e in root.iter(f"{SVG}path") if "stroke-width: 1.8" in e.get("style", ""))
    places = re.findall(r"[ML] ([\d.]+) ([\d.]+)", next(paths).get("d", ""))
    return [(float(x), float(y)) for x, y in places]


def titles(chart: Lines | Bars) -> list[str]:
    root = ElementTree.fromstring(draw(chart))
    return [element.text or "" for element in root.iter(f"{SVG}title")]


def test_a_curve_is_drawn_to_scale() -> None:
    (x0, y0), (x1, y1), (x2, y2) = curve(
        Lines("t", "step", [Series("a", [(0, 1), (10, 3), (20, 2)])])
    )
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)
    assert (y0 - y2) == pytest.approx((y0 - y1) / 2, abs=0.01)  # downwards is smaller
    assert y1 < y2 < y0


def test_a_logarithmic_axis() -> None:
    points: list[tuple[float, float]] = [(1, 1), (10, 10), (100, 100)]
    chart = Lines("t", "step", [Series("a", points)], log_x=True, log_y=True)
    (x0, y0), (x1, y1), (x2, y2) = curve(chart)
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.01)


def test_ticks_of_a_decade_are_spread_over_it() -> None:
    points: list[tuple[float, float]] = [(1e7, 1), (2e8, 2)]
    text = draw(Lines("t", "tokens", [Series("a", points)], log_x=True))
    assert re.findall(r">(\d+M)<", text) == ["10M", "20M", "50M", "100M", "200M"]


def test_long_curves_are_thinned_and_keep_their_extremes() -> None:
    points = [(float(i), math.sin(i) + math.sin(i / 900)) for i in range(20_000)]
    points[7_777] = (7_777.0, 30.0)
    chart = Lines("t", "step", [Series("a", points)])
    places = curve(chart)
    assert len(places) < 2_500
    assert min(y for _, y in places) < sorted(y for _, y in places)[1] - 20
    assert len(draw(chart)) < 80_000


def test_what_is_not_finite_is_left_out() -> None:
    points = [(0.0, math.nan), (1.0, 2.0), (2.0, math.inf), (3.0, 1.0)]
    assert len(curve(Lines("t", "x", [Series("a", points)]))) == 2
    ElementTree.fromstring(draw(Lines("t", "x", [Series("a", [(0, math.nan)])])))
    ElementTree.fromstring(draw(Lines("t", "x", [Series("a", [(5, 5)])])))
    ElementTree.fromstring(draw(Lines("t", "x", [])))


def test_values_show_under_the_pointer() -> None:
    chart = Lines("t", "step", [Series("a", [(0, 1), (10, 3500)]), Series("b", [(5, 2)], "dots")])
    assert titles(chart) == ["a: 1 at 0", "a: 3.5k at 10", "b: 2 at 5"]
    behind = Series("c", [(0, 1), (1, 2)], "faint")
    assert titles(Lines("t", "step", [behind])) == []
    long = Lines("t", "step", [Series("", [(i, i) for i in range(1000)])])
    assert len(titles(long)) <= 48


def test_a_curve_with_an_axis_of_its_own() -> None:
    """One chart holds losses in nats and in bits, each with its axis."""
    loss, bits = Series("a", [(0, 9), (1, 3)]), Series("b", [(0, 2), (1, 1)], on_right=True)
    text = draw(Lines("t", "step", [loss, bits], "nats per token", "bits per byte", log_y=True))
    for label in ("nats per token", "bits per byte", ">a<", ">b<"):
        assert label in text
    (x0, y0), (x1, y1) = curve(Lines("t", "step", [bits, loss], "", "right"))
    assert x0 < x1
    assert y0 < y1


def test_the_legend_names_what_has_a_name() -> None:
    points: list[tuple[float, float]] = [(0, 1), (1, 2)]
    text = draw(Lines("t", "", [Series("", points), Series("a", points), Series("b", points)]))
    assert ">a<" in text
    assert ">b<" in text
    assert "_child" not in text
    assert ">a<" not in draw(Lines("t", "", [Series("", points), Series("a", points)]))


@pytest.mark.parametrize("log_y", [False, True])
def test_a_curve_of_one_point_is_marked(log_y: bool) -> None:
    loss, bits = Series("a", [(0, 9), (9, 3)]), Series("b", [(9, 1)], color=1, on_right=True)
    text = draw(Lines("t", "step", [loss, bits], "nats per token", "bits per byte", log_y=log_y))
    # In the legend and in the chart; another mark appears only under the pointer.
    visible = re.sub(r'<g class="value">.*?</g>', "", text, flags=re.DOTALL)
    assert len(re.findall(r'<use [^>]*style="fill: #c2500f"/>', visible)) == 2
    assert "b: 1 at 9" in text


def test_a_second_scale_of_the_same_curve() -> None:
    chart = Lines("t", "step", [Series("", [(0, 100), (1, 200)])], "", "%", 0.5, from_zero=True)
    assert {">200<", ">100<", ">%<"} <= set(re.findall(r">[^<>\s]+<", draw(chart)))


def test_a_chart_is_the_same_each_time() -> None:
    band = [(0.0, 0.5, 1.5), (1.0, 1.0, 3.0)]
    chart = Lines("t", "step", [Series("a", [(0, 1), (1, 2)], band=band)])
    assert draw(chart) == draw(chart)


def test_texts_cannot_become_markup() -> None:
    series = [Series(HOSTILE, [(0, 1), (1, 2)]), Series("b", [(0, 1)])]
    for chart in (
        Lines(HOSTILE, HOSTILE, series, HOSTILE),
        Bars(HOSTILE, [(HOSTILE, 0.5, (0.4, 0.6), HOSTILE)]),
    ):
        root = ElementTree.fromstring(draw(chart))
        assert not list(root.iter(f"{SVG}script"))
        assert root.get("aria-label") == HOSTILE
        assert any(element.text == HOSTILE for element in root.iter(f"{SVG}text"))


def test_bars_start_at_zero_and_go_both_ways() -> None:
    bars = [("a", 0.5, (0.4, 0.6), "50%"), ("b", -0.25, (-0.3, -0.2), "")]
    root = ElementTree.fromstring(draw(Bars("t", bars)))
    paths = [e for e in root.iter(f"{SVG}path") if "fill: #" in e.get("style", "")]
    spans = []
    for path in paths:
        xs = [float(x) for x in re.findall(r"[ML] ([\d.]+)", path.get("d", ""))]
        spans.append((min(xs), max(xs)))
    (zero, right), (left, end) = spans
    assert end == pytest.approx(zero, abs=0.01)
    assert right - zero == pytest.approx(2 * (end - left), abs=0.01)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234, "1.23k"),
        (999_960, "1M"),
        (0.00012, "0.00012"),
        (-2.5e9, "-2.5B"),
        (12, "12"),
    ],
)
def test_compact_numbers(value: float, text: str) -> None:
    assert compact(value) == text
