"""One run's charts in a browser: what they hold and how they move."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

RUN = "chartsrun1"
POINTS = 12_000
SPIKE_STEP, SPIKE = 7_777, 50.0
NAN_STEP = 5_000


def loss(step: int) -> float:
    return 2 + 4 * math.exp(-step / 2000) + 0.1 * math.sin(step * 1.7)


@pytest.fixture
def charts(server: Any) -> Any:
    """A run with a long noisy series with a spike and a NaN, and a short one."""
    server.begin(RUN, "charts")
    values: dict[int, float | str] = {step: loss(step) for step in range(POINTS)}
    values[SPIKE_STEP] = SPIKE
    values[NAN_STEP] = "NaN"
    evals = {step: 1 - step / 20_000 for step in range(0, POINTS, 1000)}
    tokens = {step: step * 1024.0 for step in range(POINTS)}
    server.log(RUN, {"train/loss": values, "val/bpb": evals, "train/tokens": tokens})
    return server


def open_run(page: Any, server: Any) -> None:
    page.goto(f"{server.url}/runs/{RUN}")
    page.wait_for_selector(".tabs")


def plot(page: Any, metric: str) -> dict[str, float]:
    """Where a chart's plotting area is on the page."""
    over = page.locator(f"figure[data-metric='{metric}'] .u-over")
    over.scroll_into_view_if_needed()
    box: dict[str, float] = over.bounding_box()
    return box


def drag(page: Any, box: dict[str, float], start: float, end: float) -> None:
    y = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + start * box["width"], y)
    page.mouse.down()
    page.mouse.move(box["x"] + end * box["width"], y, steps=6)
    page.mouse.up()


def test_charts_hold_the_series_with_spike_and_nan(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    chart = wait_for_chart(page, "train/loss")
    (line,) = chart["lines"]
    assert line["count"] == POINTS
    assert line["sampled"]
    assert len(line["x"]) <= 2000
    assert line["y"][line["x"].index(SPIKE_STEP)] == SPIKE
    assert line["nonfinite"] == [[NAN_STEP, NAN_STEP, "NaN"]]
    assert chart["axes"]["y"][1] < 10  # the spike is marked at the edge
    assert chart["axes"]["x"] == [0, POINTS - 1]
    short = wait_for_chart(page, "val/bpb")["lines"][0]
    assert short["x"] == list(range(0, POINTS, 1000))
    assert short["y"] == [pytest.approx(1 - step / 20_000) for step in short["x"]]
    groups = page.locator(".chart-group").evaluate_all("(all) => all.map((g) => g.dataset.group)")
    assert groups == ["train", "val"]


def test_the_spike_and_the_nan_are_drawn(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{charts.url}/runs/{RUN}?fit=all")
    chart = wait_for_chart(page, "train/loss")
    assert chart["axes"]["y"][1] > SPIKE
    page.wait_for_timeout(100)  # two frames and more: the canvas shows what the chart holds
    drawn = page.evaluate(
        """() => {
          const canvas = document.querySelector("figure[data-metric='train/loss'] canvas");
          const { width, height } = canvas;
          const pixels = canvas.getContext("2d").getImageData(0, 0, width, height).data;
          const count = (left, right, top, bottom, test) => {
            let found = 0;
            for (let y = top; y < bottom; y++) for (let x = left; x < right; x++) {
              const at = 4 * (y * width + x);
              if (pixels[at + 3] > 100 && test(...pixels.slice(at, at + 3))) found += 1;
            }
            return found;
          };
          const chart = endlexCharts.find((c) => c.metric === "train/loss");
          const over = document.querySelector("figure[data-metric='train/loss'] .u-over");
          const ratio = devicePixelRatio;
          const left = over.offsetLeft * ratio, plotWidth = over.offsetWidth * ratio;
          const top = over.offsetTop * ratio, plotHeight = over.offsetHeight * ratio;
          const [low, high] = chart.axes.x;
          const at = (step) => Math.round(left + ((step - low) / (high - low)) * plotWidth);
          const colored = (r, g, b) => Math.max(r, g, b) - Math.min(r, g, b) > 40;
          const red = (r, g, b) => r > g + 80 && r > b + 80;
          const middle = Math.round(top + plotHeight / 2);
          const bottom = Math.round(top + plotHeight);
          return {
            spike: count(at(7777) - 3, at(7777) + 4, middle - 20, middle, colored),
            beside: count(at(9000) - 3, at(9000) + 4, middle - 20, middle, colored),
            nan: count(at(5000) - 4, at(5000) + 5, bottom - 6, bottom, red),
          };
        }"""
    )
    assert drawn["spike"] >= 15  # a vertical stroke, one pixel or more in each of 20 rows
    assert drawn["beside"] == 0
    assert drawn["nan"] > 10


def test_dragging_zooms_and_fetches_every_point_of_the_range(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "train/loss")
    drag(page, plot(page, "train/loss"), 0.62, 0.68)
    chart = wait_for_chart(page, "train/loss", "chart.view && !chart.lines[0].sampled")
    low, high = chart["view"]["from"], chart["view"]["to"]
    assert low == pytest.approx(0.62 * POINTS, abs=0.01 * POINTS)
    assert high == pytest.approx(0.68 * POINTS, abs=0.01 * POINTS)
    (line,) = chart["lines"]
    inside = {step: y for step, y in zip(line["x"], line["y"], strict=True) if low <= step <= high}
    assert list(inside) == list(range(math.ceil(low), math.floor(high) + 1))
    assert inside[SPIKE_STEP] == SPIKE
    assert inside[SPIKE_STEP + 1] == pytest.approx(loss(SPIKE_STEP + 1))
    # The other charts went along, and a double click shows everything again.
    assert wait_for_chart(page, "val/bpb")["view"] == chart["view"]
    box = plot(page, "train/loss")
    page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    whole = wait_for_chart(page, "train/loss", "!chart.view && chart.axes.x[0] === 0")
    assert whole["axes"]["x"] == [0, POINTS - 1]


def test_shift_drag_pans_and_requests_that_are_superseded_are_few(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "train/loss")
    drag(page, plot(page, "train/loss"), 0.4, 0.5)
    before = wait_for_chart(page, "train/loss", "chart.view")["view"]
    sent = page.evaluate("() => endlexRequests[0].sent")
    page.keyboard.down("Shift")
    drag(page, plot(page, "train/loss"), 0.6, 0.35)
    page.keyboard.up("Shift")
    after = wait_for_chart(page, "train/loss", f"chart.view.from > {before['from'] + 10}")["view"]
    width = before["to"] - before["from"]
    assert after["to"] - after["from"] == pytest.approx(width)
    assert after["from"] - before["from"] == pytest.approx(0.25 * width, rel=0.1)
    page.wait_for_timeout(400)  # longer than any request waits to be sent
    assert page.evaluate("() => endlexRequests[0].sent") - sent <= 6


def test_keys_move_the_chart(page: Any, charts: Any, wait_for_chart: Callable[..., Any]) -> None:
    open_run(page, charts)
    wait_for_chart(page, "train/loss")
    page.locator("figure[data-metric='train/loss'] .chart-body").focus()
    page.keyboard.press("+")
    near = wait_for_chart(page, "train/loss", "chart.view")["view"]
    page.keyboard.press("ArrowRight")
    moved = wait_for_chart(page, "train/loss", f"chart.view.from > {near['from']}")["view"]
    assert moved["to"] - moved["from"] == pytest.approx(near["to"] - near["from"])
    page.keyboard.press("0")
    wait_for_chart(page, "train/loss", "!chart.view")
    label = page.locator("figure[data-metric='train/loss'] .chart-body").get_attribute("aria-label")
    assert "12,000 points" in label


def test_smoothing_is_the_bias_corrected_average(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.get_by_label("Smoothing").fill("33")  # a strength of 1 - 10 ** -0.99
    chart = wait_for_chart(page, "val/bpb", "chart.lines[0].smoothed")
    strength = 1 - 10**-0.99
    total = weight = 0.0
    expected = []
    for y in chart["lines"][0]["y"]:  # twelve points: each counts as one
        total, weight = total * strength + y, weight * strength + 1
        expected.append(total / weight)
    assert chart["lines"][0]["smoothed"] == pytest.approx(expected)
    assert expected[0] == chart["lines"][0]["y"][0]  # no pull towards zero at the start


def test_a_spike_does_not_stay_in_the_average(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{charts.url}/runs/{RUN}?smooth=0.99")
    expect(page.get_by_label("Strength as a number")).to_have_value("0.99")
    (line,) = wait_for_chart(page, "train/loss", "chart.lines[0].smoothed")["lines"]
    at = line["y"].index(SPIKE)
    after = line["smoothed"][at : at + 20]
    assert max(after) < 2.5  # with it, the average would be 0.5 higher for long
    assert min(after) > 2


def test_the_address_keeps_what_is_looked_at(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.get_by_label("Horizontal axis").select_option("train/tokens")
    page.get_by_label("Strength as a number").fill("0.5")
    page.keyboard.press("Tab")
    page.get_by_label("Filter charts").fill("^val bpb$")
    expect(page.locator("figure")).to_have_count(1)
    page.locator(".chart-body").focus()
    page.keyboard.press("+")
    wait_for_chart(page, "val/bpb", "chart.view")
    page.wait_for_function("() => location.search.includes('zoom=')")
    zoomed = page.evaluate("() => endlexCharts.find((c) => c.metric === 'val/bpb').view")
    page.evaluate("() => localStorage.clear()")
    page.reload()
    chart = wait_for_chart(page, "val/bpb", "chart.view && chart.lines[0].smoothed")
    assert chart["x"] == "train/tokens"
    assert chart["view"]["from"] == pytest.approx(zoomed["from"], rel=1e-6)
    expect(page.locator("figure")).to_have_count(1)


def test_a_shared_address_shows_what_was_looked_at_whatever_is_remembered_here(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.get_by_label("Horizontal axis").select_option("elapsed")
    page.get_by_role("button", name="zoom together").click()
    page.goto(f"{charts.url}/runs/{RUN}")  # an address that says nothing: as remembered
    assert wait_for_chart(page, "val/bpb")["x"] == "elapsed"
    assert "x=elapsed" in page.url  # for those whom it is given to
    page.goto(f"{charts.url}/runs/{RUN}?smooth=0.5")
    assert wait_for_chart(page, "val/bpb")["x"] == "step"
    together = page.get_by_role("button", name="zoom together")
    expect(together).to_have_attribute("aria-pressed", "false")  # how charts move is one's own


def test_panels_are_put_together_moved_and_kept(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.get_by_role("button", name="+ panel").click()
    page.get_by_label("Metrics").fill("val/bpb, train/l*")
    page.get_by_label("Title").fill("Quality")
    page.get_by_label("Horizontal axis").last.fill("train/tokens")
    page.get_by_label("y to").fill("8")
    page.get_by_role("button", name="Save").click()
    panels = page.locator(".panel-chart .chart-title")
    expect(panels).to_have_text(["Quality"])
    found = "() => endlexCharts.find((chart) => chart.title === 'Quality')"
    drawn = "chart?.lines.every((line) => line.x.length) && chart.axes.y[1] === 8"
    page.wait_for_function(f"() => {{ const chart = ({found})(); return {drawn}; }}")
    chart = page.evaluate(found)
    assert [line["label"] for line in chart["lines"]] == ["val/bpb", "train/loss"]
    assert chart["x"] == "train/tokens"
    assert len({line["color"] for line in chart["lines"]}) == 2
    page.locator("figure[data-metric='train/tokens']").last.hover()
    page.get_by_label("Pin to the panels: train/tokens").click()
    expect(panels).to_have_text(["Quality", "train/tokens"])
    page.get_by_label("Move to the left: train/tokens").focus()
    page.keyboard.press("Enter")
    expect(panels).to_have_text(["train/tokens", "Quality"])
    with page.expect_response(is_saved):
        panels.nth(1).drag_to(panels.nth(0))
    expect(panels).to_have_text(["Quality", "train/tokens"])
    page.goto(f"{charts.url}/compare?runs={RUN}")
    expect(panels).to_have_text(["Quality", "train/tokens"])
    page.get_by_label("Remove panel: Quality").focus()
    with page.expect_response(is_saved):
        page.keyboard.press("Enter")
    expect(panels).to_have_text(["train/tokens"])
    page.reload()
    expect(panels).to_have_text(["train/tokens"])


def is_saved(response: Any) -> bool:
    return response.request.method == "PUT" and response.ok


def test_changes_are_saved_in_their_order_and_outlive_their_page(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.add_init_script(
        "const plain = fetch; window.kept = {};"
        "fetch = (url, how) => ((kept[how.method] = how.keepalive), plain(url, how));"
    )
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    held: list[Any] = []
    page.route("**/settings?*", lambda route: held.append(route))
    for metric in ("val/bpb", "train/loss"):
        page.locator(f"figure[data-metric='{metric}']").last.hover()
        page.get_by_label(f"Pin to the panels: {metric}").click()
    expect(page.locator(".panel-chart .chart-title")).to_have_text(["val/bpb", "train/loss"])
    assert len(held) == 1  # the second waits until the first is saved
    with page.expect_request("**/settings?*") as second:
        held[0].continue_()
    assert [panel["metrics"] for panel in second.value.post_data_json["list"]] == [
        ["val/bpb"],
        ["train/loss"],
    ]
    assert page.evaluate("() => kept") == {"GET": False, "PUT": True}


def test_the_panels_shown_after_two_failures_are_those_that_the_server_has(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    panels = page.locator(".panel-chart .chart-title")
    with page.expect_response("**/settings?*") as saved:
        page.locator("figure[data-metric='train/tokens']").last.hover()
        page.get_by_label("Pin to the panels: train/tokens").click()
    assert saved.value.ok
    page.evaluate(
        "() => { const plain = fetch; window.held = [];"
        "fetch = (url, how) => how.method === 'PUT'"
        " ? new Promise((_, reject) => held.push(reject)) : plain(url, how); }"
    )
    for metric in ("val/bpb", "train/loss"):
        page.locator(f"figure[data-metric='{metric}']").last.hover()
        page.get_by_label(f"Pin to the panels: {metric}").click()
    expect(panels).to_have_text(["train/tokens", "val/bpb", "train/loss"])
    for number in range(2):  # the second change is sent when the first has failed
        page.wait_for_function("(number) => held.length === number + 1", arg=number)
        page.evaluate("(number) => held[number](new Error('the network is down'))", number)
    expect(panels).to_have_text(["train/tokens"])


def test_a_change_that_waits_for_another_is_saved_when_the_page_is_left(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.add_init_script(
        "const plain = fetch; window.held = 0;"
        "fetch = (url, how) => how.method === 'PUT' && !held++ ? new Promise(() => {})"
        " : plain(url, how);"
    )
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    for metric in ("val/bpb", "train/loss"):
        page.locator(f"figure[data-metric='{metric}']").last.hover()
        page.get_by_label(f"Pin to the panels: {metric}").click()
    panels = page.locator(".panel-chart .chart-title")
    expect(panels).to_have_text(["val/bpb", "train/loss"])
    assert page.evaluate("() => held") == 1
    page.reload()
    expect(panels).to_have_text(["val/bpb", "train/loss"])


def test_axes_switch_to_time_tokens_and_logarithms(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    axis = page.get_by_label("Horizontal axis")
    axis.select_option("elapsed")
    chart = wait_for_chart(page, "val/bpb", "chart.x === 'elapsed'")
    assert chart["lines"][0]["x"] == pytest.approx(range(0, POINTS, 1000))
    axis.select_option("train/tokens")
    chart = wait_for_chart(page, "val/bpb", "chart.x === 'train/tokens'")
    assert chart["lines"][0]["x"] == [1024.0 * step for step in range(0, POINTS, 1000)]
    axis.select_option("step")
    page.get_by_role("button", name="log x", exact=True).click()
    page.get_by_role("button", name="log y", exact=True).click()
    chart = wait_for_chart(page, "val/bpb", "chart.log.x && chart.log.y && chart.x === 'step'")
    assert chart["axes"]["x"][0] == 1000  # the first step that has a logarithm
    assert chart["axes"]["y"][0] > 0


def test_new_points_and_new_metrics_arrive_live(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    charts.log(RUN, {"val/bpb": {POINTS: 0.25}, "extra/new": {POINTS: 7.0}})
    chart = wait_for_chart(page, "val/bpb", f"chart.lines[0].x.at(-1) === {POINTS}")
    assert chart["lines"][0]["y"][-1] == 0.25
    assert len(chart["lines"][0]["x"]) == 13  # appended, nothing twice
    assert wait_for_chart(page, "extra/new")["lines"][0]["y"] == [7.0]


def test_a_zoomed_chart_stays_fine_while_points_arrive(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page.goto(f"{charts.url}/runs/{RUN}?zoom=11800~12010")
    fine = "!chart.lines[0].sampled && chart.lines[0].x.at(-1) === "
    wait_for_chart(page, "train/loss", f"{fine}{POINTS - 1}")  # from an address too
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    charts.log(RUN, {"train/loss": {POINTS: 2.0}})
    wait_for_chart(page, "train/loss", f"{fine}{POINTS}")


def test_points_that_arrive_while_a_chart_is_built_anew_are_not_lost(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "val/bpb")
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    page.route("**/series?*from=*", lambda route: None)  # is never answered
    with page.expect_request("**/series?*from=*"):
        charts.log(RUN, {"val/bpb": {POINTS: 0.25}})
    page.get_by_role("button", name="log y", exact=True).click()
    wait_for_chart(page, "val/bpb", f"chart.log.y && chart.lines[0].x.at(-1) === {POINTS}")


def test_only_charts_on_the_screen_are_built(page: Any, server: Any) -> None:
    server.begin(RUN, "many")
    server.log(RUN, {f"group/metric{number:03}": {0: 1.0, 1: 2.0} for number in range(150)})
    open_run(page, server)
    page.wait_for_function("() => window.endlexCharts?.some((chart) => chart.built)")
    assert len(page.evaluate("() => endlexCharts")) == 150
    assert page.locator("canvas").count() < 40
    last = page.locator("figure[data-metric='group/metric149']")
    last.scroll_into_view_if_needed()
    expect(last.locator("canvas")).to_have_count(1)
    page.wait_for_function("() => document.querySelectorAll('canvas').length < 40")


def test_groups_beyond_sixty_charts_are_closed(page: Any, server: Any) -> None:
    server.begin(RUN, "many")
    names = [f"layer{group}/metric{number:03}" for group in range(6) for number in range(50)]
    server.log(RUN, {name: {0: 1.0, 1: 2.0} for name in names})
    open_run(page, server)
    page.wait_for_function("() => window.endlexCharts?.some((chart) => chart.built)")
    assert len(page.evaluate("() => endlexCharts")) == 50
    page.get_by_label("Filter charts").fill("layer[3-5] metric04[89]")
    expect(page.locator("figure")).to_have_count(6)


def test_groups_collapse_and_stay_so(
    page: Any, charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    open_run(page, charts)
    wait_for_chart(page, "train/loss")
    page.locator("[data-group=train] > summary").click()
    expect(page.locator("figure[data-metric='train/loss']")).not_to_be_visible()
    page.reload()
    wait_for_chart(page, "val/bpb")
    expect(page.locator("figure[data-metric='train/loss']")).not_to_be_visible()


def test_a_finger_drags_a_zoomed_chart(
    new_page: Callable[..., Any], charts: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page = new_page(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    open_run(page, charts)
    wait_for_chart(page, "train/loss")
    page.locator("figure[data-metric='train/loss'] .chart-body").focus()
    page.keyboard.press("+")
    before = wait_for_chart(page, "train/loss", "chart.view")["view"]
    box = plot(page, "train/loss")
    y = box["y"] + box["height"] / 2
    session = page.context.new_cdp_session(page)

    def touch(kind: str, *x: float) -> None:
        points = [{"x": box["x"] + share * box["width"], "y": y} for share in x]
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", 0.7)
    for share in (0.6, 0.5, 0.4):
        touch("touchMove", share)
    touch("touchEnd")
    wait_for_chart(page, "train/loss", f"chart.view.from > {before['from'] + 10}")
