"""The comparison in a browser: overlaid lines, the legend, differing configuration, figures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

RUNS = ("compared0", "compared9", "compared10")
"""Ids that prefer the same colour: who gets it must not depend on the order."""


@pytest.fixture
def compared(server: Any) -> Any:
    """Three runs of different lengths, rates and starting times, one with a metric of its own."""
    for number, run in enumerate(RUNS):
        config = {"optim": {"lr": 0.1 * (number + 1), "kind": "muon"}, "depth": 12}
        server.begin(run, f"run {number}", config=config)
        steps = range(0, 100 * (number + 1), 10)
        server.log(run, {"train/loss": {step: 5.0 - number - step / 1000 for step in steps}})
    server.log(RUNS[2], {"val/bpb": {0: 0.75, 290: 0.5}})
    return server


def open_comparison(page: Any, server: Any, tab: str = "") -> None:
    page.goto(f"{server.url}/compare?runs={','.join(RUNS)}{tab}")


def test_every_run_is_one_line_on_its_own_steps(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    chart = wait_for_chart(page, "train/loss", "chart.lines.every((line) => line.x.length)")
    lines = {line["run"]: line for line in chart["lines"]}
    assert list(lines) == list(RUNS)
    for number, run in enumerate(RUNS):
        assert lines[run]["x"] == list(range(0, 100 * (number + 1), 10))
        assert lines[run]["y"][0] == 5.0 - number
    assert chart["axes"]["x"] == [0, 290]
    assert [line["run"] for line in wait_for_chart(page, "val/bpb")["lines"]] == [RUNS[2]]


def test_the_legend_hides_runs_and_colours_stay(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    wait_for_chart(page, "train/loss", "chart.lines.every((line) => line.x.length)")
    swatches = "() => [...document.querySelectorAll('.legend .swatch')].map((s) => s.style.cssText)"
    colors = page.evaluate(swatches)
    assert len(set(colors)) == 3
    page.get_by_label("Show run 2").uncheck()
    chart = wait_for_chart(page, "train/loss", "chart.lines[2].hidden && chart.axes.x[1] === 190")
    assert [line["hidden"] for line in chart["lines"]] == [False, False, True]
    assert page.evaluate(swatches) == colors
    page.goto(f"{compared.url}/compare?runs={RUNS[2]},{RUNS[1]},{RUNS[0]}")
    wait_for_chart(page, "train/loss")
    assert page.evaluate(swatches) == colors[::-1]  # whatever the order in the address


def test_the_cursor_names_every_run(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    wait_for_chart(page, "train/loss", "chart.lines.every((line) => line.x.length)")
    box = page.locator("figure[data-metric='train/loss'] .u-over").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 4, box["y"] + box["height"] / 2)
    tip = page.locator("figure[data-metric='train/loss'] .chart-tip")
    expect(tip.locator(".tip-label")).to_have_text(["run 0", "run 1", "run 2"])
    # A cursor at the same step stands in the other charts too, without a box.
    other = page.locator("figure[data-metric='val/bpb']")
    expect(other.locator(".chart-value")).to_contain_text("step")
    expect(other.locator(".chart-tip")).to_be_hidden()


def test_only_differing_keys_are_shown(page: Any, compared: Any) -> None:
    open_comparison(page, compared, "#config")
    keys = page.locator("tbody th")
    expect(keys).to_have_text(["optim.lr"])
    page.get_by_label("show equal keys too").check()
    expect(keys).to_have_text(["depth", "optim.kind", "optim.lr"])


def test_the_summary_has_last_lowest_and_highest(page: Any, compared: Any) -> None:
    open_comparison(page, compared, "#summary")
    cells = page.locator("tr[data-metric='train/loss'] td")
    expect(cells).to_have_text(["4.91", "3.81", "2.71"])
    page.get_by_label("Which figure").select_option("max")
    expect(cells).to_have_text(["5", "4", "3"])


def test_runs_that_are_not_there_are_left_out(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{compared.url}/compare?runs={RUNS[0]},nosuchrun1")
    wait_for_chart(page, "train/loss")
    expect(page.locator(".legend li")).to_have_count(1)
    expect(page.locator(".toast-error")).to_contain_text("nosuchrun1")
