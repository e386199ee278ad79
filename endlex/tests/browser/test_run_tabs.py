"""One run's page in a browser: everything beside its charts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

RUN = "tabsofrun1"
HOSTILE = "<img src=x onerror=alert(1)>"


@pytest.fixture
def logged(server: Any) -> Any:
    """A run with a configuration and a loss that was once NaN."""
    server.begin(RUN, "tabs", config={"model": {"depth": 12}, "seed": 1, "note": HOSTILE})
    server.log(RUN, {"train/loss": {0: 3.0, 1: "NaN", 2: 2.5}})
    return server


def open_run(page: Any, server: Any, tab: str = "") -> None:
    page.goto(f"{server.url}/runs/{RUN}{tab}")
    page.wait_for_selector(".tabs")


def test_samples_follow_the_step_slider_and_stay_text(page: Any, logged: Any) -> None:
    for step in (100, 200, 300):
        logged.record(RUN, "text", step=step, name=HOSTILE, text=f"{HOSTILE} at {step}")
    open_run(page, logged, "#samples")
    sample = page.locator(".sample")
    expect(sample).to_have_text(f"{HOSTILE} at 300")
    page.get_by_label("Step").press("ArrowLeft")
    expect(sample).to_have_text(f"{HOSTILE} at 200")
    assert page.locator("main img").count() == 0


def test_tables_are_shown_with_their_cells_as_text(page: Any, logged: Any) -> None:
    rows = [["arc", 0.41], [HOSTILE, None]]
    logged.record(RUN, "table", step=5, name="tasks", columns=["task", "accuracy"], rows=rows)
    open_run(page, logged, "#tables")
    cells = page.locator(".record td")
    expect(cells).to_have_text(["arc", "0.41", HOSTILE, "null"])


def test_the_configuration_is_searched(page: Any, logged: Any) -> None:
    open_run(page, logged, "#config")
    rows = page.locator(".config-row")
    expect(rows).to_have_count(3)
    page.get_by_label("Filter the configuration").fill("depth")
    expect(rows).to_have_count(1)
    expect(rows).to_contain_text("12")


def test_system_metrics_have_a_tab_of_their_own(
    page: Any, logged: Any, wait_for_chart: Callable[..., Any]
) -> None:
    logged.log(RUN, {"system/cpu": {20_000: 0.5, 20_001: 0.75}})
    open_run(page, logged, "#system")
    chart = wait_for_chart(page, "system/cpu")
    assert chart["x"] == "elapsed"
    assert chart["lines"][0]["y"] == [0.5, 0.75]
    page.get_by_role("tab", name="Charts").click()
    expect(page.locator("figure[data-metric='system/cpu']")).to_have_count(0)


def test_alerts_stand_above_until_dismissed(page: Any, logged: Any) -> None:
    open_run(page, logged)
    alert = page.locator(".alert", has_text="train/loss")
    expect(alert).to_have_count(1)  # of the NaN
    alert.get_by_role("button", name="Dismiss").click()
    expect(alert).to_have_count(0)
    assert logged.client.get("/alerts", params={"run": RUN, "open": "true"}).json()["alerts"] == []


def test_tabs_follow_the_arrow_keys(page: Any, logged: Any) -> None:
    open_run(page, logged)
    page.get_by_role("tab", name="Charts").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Samples")).to_have_attribute("aria-selected", "true")
    assert page.url.endswith("#samples")


def test_a_run_that_is_not_there_says_so(page: Any, server: Any) -> None:
    page.goto(f"{server.url}/runs/nosuchrun1")
    expect(page.locator(".empty")).to_contain_text("There is no run nosuchrun1")


def test_a_verified_checkpoint_has_links_to_its_files(page: Any, logged: Any) -> None:
    content = b"weights" * 1000
    sha256 = hashlib.sha256(content).hexdigest()
    assert logged.client.put(f"/parts/{sha256}", content=content).status_code == 201
    part = {"sha256": sha256, "bytes": len(content)}
    file = {"path": "model/weights.bin", "bytes": len(content), "sha256": sha256, "parts": [part]}
    manifest = {"protocol": 2, "name": "step-5", "step": 5, "created": 1.7e9, "files": [file]}
    manifest |= {"aliases": ["best"], "metadata": {"val/bpb": 0.9}}
    answer = logged.client.put(f"/runs/{RUN}/checkpoints/step-5", json=manifest)
    assert answer.status_code in (200, 201, 202), answer.text
    files = [{"path": "model/weights.bin", "bytes": 7000}]
    logged.record(RUN, "checkpoint", step=9, name="step-9", files=files, aliases=[], metadata={})
    open_run(page, logged, "#checkpoints")
    waiting, verified = page.locator(".checkpoint").all()
    expect(waiting.locator(".badge")).to_have_text("not here yet")
    expect(verified.locator(".badge")).to_have_text("✓ verified")
    expect(verified).to_contain_text("6.8 KiB")
    expect(verified.locator(".tag")).to_have_text("best")
    verified.locator("summary").click()
    with page.expect_download() as download:
        verified.get_by_role("link", name="model/weights.bin").click()
    assert download.value.path().read_bytes() == content
    waiting.locator("summary").click()
    expect(waiting.locator(".files")).to_contain_text("Nothing more is known")
