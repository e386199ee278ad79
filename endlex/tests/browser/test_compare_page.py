"""The comparison in a browser: overlaid lines, the legend, differing configuration, figures."""

from __future__ import annotations

import time
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
    expect(tip.locator(".tip-label")).to_have_count(3)
    expect(tip.locator(".tip-closest .tip-label")).to_have_text("run 1")
    # Below the nearest the best, which of a loss is the lowest, not the highest.
    assert tip.locator(".tip-label").all_inner_texts() == ["run 1", "run 2", "run 0"]
    expect(tip.locator(".tip-row", has_text="★")).to_contain_text("run 2")
    # A cursor at the same step stands in the other charts too, without a box.
    other = page.locator("figure[data-metric='val/bpb']")
    expect(other.locator(".chart-value")).to_contain_text("step")
    expect(other.locator(".chart-tip")).to_be_hidden()


def test_the_table_has_differing_keys_marks_the_best_and_shows_differences(
    page: Any, compared: Any
) -> None:
    open_comparison(page, compared, "#table")
    heads = page.locator("thead .sort")
    expect(heads).to_have_text(
        ["Name", "optim.lr", "val/bpb", "train/loss", "Group", "Tags", "Duration"]
    )
    row = page.locator(f"tr[data-run={RUNS[2]}]")
    expect(row.locator(".best")).to_have_text(["2.71"])
    page.locator(f"tr[data-run={RUNS[0]}]").get_by_role("button", name="baseline").click()
    expect(row.locator("td[data-label='train/loss'] .delta.good")).to_have_text("−2.2")
    expect(row.locator("td[data-label='optim.lr'] strong")).to_have_text("0.3")
    page.reload()  # the address keeps it
    expect(page.locator("tr.baseline")).to_have_attribute("data-run", RUNS[0])
    page.get_by_role("button", name="train/loss").click()
    names = page.locator("tbody .run-name")
    expect(names).to_have_text(["run 2", "run 1", "run 0"])


def test_runs_are_added_and_removed_in_place(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{compared.url}/compare?runs={RUNS[0]},{RUNS[1]}")
    wait_for_chart(page, "train/loss")
    page.get_by_label("Add a run").fill("run 2")
    option = page.locator("#runs-to-add option")
    expect(option).to_have_count(1)
    page.get_by_label("Add a run").fill(RUNS[2])
    page.get_by_label("Add a run").dispatch_event("change")
    expect(page.locator(".legend li")).to_have_count(3)
    assert len(wait_for_chart(page, "train/loss", "chart.lines.length === 3")["lines"]) == 3
    wait_for_chart(page, "val/bpb")
    page.get_by_label("Remove run 0").click()
    lines = wait_for_chart(page, "train/loss", "chart.lines.length === 2")["lines"]
    assert [line["run"] for line in lines] == [RUNS[1], RUNS[2]]
    assert RUNS[0] not in page.url
    assert RUNS[2] in page.url
    # A hidden run that is removed is not kept in mind: "all / none" hides the others.
    page.get_by_label("Show run 1").uncheck()
    page.get_by_label("Remove run 1").click()
    page.get_by_role("button", name="all / none").click()
    expect(page.get_by_label("Show run 2")).not_to_be_checked()


def test_groups_are_a_mean_with_a_band(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    wait_for_chart(page, "train/loss", "chart.lines.every((line) => line.x.length)")
    page.get_by_label("Group runs by").select_option("group")
    (line,) = wait_for_chart(page, "train/loss", "chart.lines.length === 1")["lines"]
    assert line["label"] == "no group"
    assert (line["x"][0], line["y"][0]) == (0, pytest.approx(4.0))
    assert (line["band"]["low"][0], line["band"]["high"][0]) == (3.0, 5.0)
    assert line["y"][-1] == pytest.approx(2.71)  # there is one run alone so far
    page.get_by_label("Band of a group").select_option("error")
    (line,) = wait_for_chart(page, "train/loss", "chart.lines[0].band.high[0] < 5")["lines"]
    assert line["band"]["high"][0] == pytest.approx(4 + 1 / 3**0.5)
    page.reload()
    wait_for_chart(page, "train/loss", "chart.lines.length === 1")
    page.get_by_label("Group runs by").select_option("config.optim.lr")
    lines = wait_for_chart(page, "train/loss", "chart.lines.length === 3")["lines"]
    assert lines[1]["label"] == "optim.lr = 0.2"


def test_what_another_comparison_was_grouped_by_is_forgotten_where_it_means_nothing(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    wait_for_chart(page, "train/loss")
    page.get_by_label("Group runs by").select_option("config.optim.lr")
    for run in ("another0", "another1"):
        compared.begin(run, run, config={"optim": {"lr": 1}})
        compared.log(run, {"train/loss": {0: 1.0, 1: 2.0}})
    page.goto(f"{compared.url}/compare?runs=another0,another1")
    lines = wait_for_chart(page, "train/loss", "chart.lines.length === 2")["lines"]
    assert [line["label"] for line in lines] == ["another0", "another1"]
    expect(page.get_by_label("Group runs by")).to_have_value("")


def test_a_chosen_colour_is_the_run_s_on_every_page(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_comparison(page, compared)
    first = wait_for_chart(page, "train/loss")["lines"][1]["color"]
    page.goto(f"{compared.url}/runs/{RUNS[1]}")
    assert wait_for_chart(page, "train/loss")["lines"][0]["color"] == first
    open_comparison(page, compared)
    wait_for_chart(page, "train/loss")
    page.get_by_label("Colour of run 1").evaluate(
        "(box) => ((box.value = '#123456'), box.dispatchEvent(new Event('change')))"
    )
    wait_for_chart(page, "train/loss", "chart.lines[1].color === '#123456'")
    page.goto(f"{compared.url}/runs/{RUNS[1]}")
    assert wait_for_chart(page, "train/loss")["lines"][0]["color"] == "#123456"


def test_configuration_against_results(page: Any, compared: Any) -> None:
    open_comparison(page, compared, "#scatter")
    expect(page.locator("circle")).to_have_count(1)  # one run has val/bpb
    page.get_by_label("y", exact=True).select_option("min:train/loss")
    expect(page.locator("circle")).to_have_count(3)
    expect(page.locator("circle title").first).to_contain_text("optim.lr: 0.1")
    page.get_by_role("tab", name="Parallel").click()
    page.get_by_role("button", name="val/bpb ✕").click()
    page.get_by_label("add", exact=True).select_option("train/loss")
    expect(page.locator(".run-line")).to_have_count(3)
    expect(page.locator(".axis-name")).to_have_text(["optim.lr", "train/loss"])


class HeldAnswers:
    """The page's questions about runs, unanswered until a test lets them pass."""

    def __init__(self, page: Any) -> None:
        self._page = page
        self._routes: list[Any] = []
        page.route("**/api/v1/runs?*", lambda route: self._routes.append(route))

    def take(self, count: int) -> list[Any]:
        """Wait until `count` questions are held, and return them, oldest first."""
        deadline = time.monotonic() + 60
        while len(self._routes) < count:
            assert time.monotonic() < deadline, "no question came"
            self._page.wait_for_timeout(5)
        taken, self._routes[:] = self._routes[:count], self._routes[count:]
        return taken


def test_the_last_choice_is_shown_whichever_answer_comes_first(page: Any, compared: Any) -> None:
    open_comparison(page, compared, "#scatter")
    expect(page.locator("circle")).to_have_count(1)
    held = HeldAnswers(page)
    y, title = page.get_by_label("y", exact=True), page.locator("circle title").first
    y.select_option("min:train/loss")
    y.select_option("train/loss")
    first, last = held.take(2)
    last.continue_()
    expect(title).to_contain_text("\ntrain/loss: ")
    with page.expect_response("**/api/v1/runs?*"):
        first.continue_()
    page.wait_for_timeout(100)
    expect(title).to_contain_text("\ntrain/loss: ")


def test_two_choices_before_the_first_is_drawn_both_count(page: Any, compared: Any) -> None:
    open_comparison(page, compared, "#parallel")
    removed = page.get_by_role("button", name="val/bpb ✕")
    expect(removed).to_be_visible()
    held = HeldAnswers(page)
    removed.click()
    page.get_by_label("add", exact=True).select_option("train/loss")
    for route in held.take(2):
        route.continue_()
    expect(page.locator(".axis-name")).to_have_text(["optim.lr", "train/loss"])


def test_runs_that_are_not_there_are_left_out(
    page: Any, compared: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{compared.url}/compare?runs={RUNS[0]},nosuchrun1")
    wait_for_chart(page, "train/loss")
    expect(page.locator(".legend li")).to_have_count(1)
    expect(page.locator(".toast-error")).to_contain_text("nosuchrun1")
