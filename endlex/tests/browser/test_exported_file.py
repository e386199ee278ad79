"""An exported run, opened from the disk in a browser that has no network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

RUN = "exportrun1"
HOSTILE = "</script><img src=x onerror=alert(1)><!--<script>"


@pytest.fixture
def exported(new_page: Callable[..., Any], server: Any, tmp_path: Path) -> Any:
    """The page of the file, with everything in the run that could break out of it."""
    server.begin(RUN, HOSTILE, config={"note": HOSTILE, "depth": 12})
    values: dict[int, float | str] = {step: step / 10 for step in range(5000)}
    values[77] = "Infinity"
    server.log(RUN, {"train/loss": values, "train/tokens": {s: s * 64.0 for s in range(5000)}})
    server.record(RUN, "text", step=3, name="prompt", text=HOSTILE)
    printed = {"type": "text", "session": "s", "seq": 0, "time": 1.7e9, "name": "run/console"}
    chunks = range(1_000_000, 1_001_001)
    server.send(RUN, [{**printed, "step": step, "text": f"line {step}"} for step in chunks])
    server.record(RUN, "table", step=4, name="tasks", columns=["task"], rows=[[HOSTILE]])
    panel = {"metrics": ["train/tokens"], "title": HOSTILE}
    place = {"project": "tests", "kind": "panels", "name": "charts"}
    server.client.put("/settings", params=place, json={"list": [panel]})
    answer = server.client.get(f"/runs/{RUN}/export", params={"format": "html"})
    assert answer.status_code == 200
    assert "attachment" in answer.headers["content-disposition"]
    file = tmp_path / "run.html"
    file.write_bytes(answer.content)
    page = new_page(offline=True)
    page.requests = []
    page.on("request", lambda request: page.requests.append(request.url))
    page.goto(file.as_uri())
    page.file = file
    return page


def test_charts_samples_tables_and_config_are_inside(
    exported: Any, wait_for_chart: Callable[..., Any]
) -> None:
    page = exported
    (line,) = wait_for_chart(page, "train/loss")["lines"]
    assert line["x"][0] == 0
    assert line["x"][-1] == 4999
    assert line["y"][-1] == pytest.approx(499.9)
    assert line["nonfinite"] == [[77, 77, "Infinity"]]
    expect(page.locator("h1")).to_have_text(HOSTILE)
    expect(page.locator(".panel-chart .chart-title")).to_have_text(HOSTILE)
    page.get_by_role("tab", name="Samples").click()
    expect(page.locator(".sample")).to_have_text(HOSTILE)
    page.get_by_role("tab", name="Log").click()
    printed = page.locator(".sample").text_content().splitlines()
    assert (len(printed), printed[-1]) == (1000, "line 1001000")
    page.get_by_role("tab", name="Tables").click()
    expect(page.locator(".record td")).to_have_text(HOSTILE)
    page.get_by_role("tab", name="Config").click()
    expect(page.locator("[data-key=note] dd")).to_have_text(HOSTILE)
    assert page.locator("main img").count() == 0
    assert page.requests == [page.file.as_uri()]


def test_its_charts_zoom_and_change_axes(exported: Any, wait_for_chart: Callable[..., Any]) -> None:
    page = exported
    wait_for_chart(page, "train/loss")
    page.get_by_label("Horizontal axis").select_option("train/tokens")
    chart = wait_for_chart(page, "train/loss", "chart.x === 'train/tokens'")
    assert chart["lines"][0]["x"][-1] == 4999 * 64
    page.locator("figure[data-metric='train/loss'] .chart-body").focus()
    page.keyboard.press("+")
    wait_for_chart(page, "train/loss", "chart.view")
