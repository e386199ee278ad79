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


def test_tables_are_sorted_filtered_and_downloaded(page: Any, logged: Any) -> None:
    rows = [["arc", 9], ["mmlu", 41], ["core", 10]]
    logged.record(RUN, "table", step=5, name="tasks", columns=["task", "n"], rows=rows)
    open_run(page, logged, "#tables")
    page.get_by_role("button", name="n", exact=True).click()
    first = page.locator(".record td:first-child")
    expect(first).to_have_text(["arc", "core", "mmlu"])
    page.get_by_label("Filter tasks").fill("1")
    expect(first).to_have_text(["core", "mmlu"])
    with page.expect_download() as started:
        page.get_by_role("button", name="CSV").click()
    assert started.value.path().read_text().splitlines() == [
        '"task","n"',
        '"core","10"',
        '"mmlu","41"',
    ]


def test_a_histogram_is_drawn(page: Any, logged: Any) -> None:
    rows = [[0, 1, 5], [1, 2, 10]]
    logged.record(RUN, "table", step=5, name="norms", columns=["low", "high", "count"], rows=rows)
    open_run(page, logged, "#tables")
    bars = page.locator(".bar")
    expect(bars).to_have_count(2)
    heights = bars.evaluate_all("(all) => all.map((bar) => Number(bar.getAttribute('height')))")
    assert heights[0] == heights[1] / 2


PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de"
    "0000000c49444154789c63f8cfc000000301010018dd8db00000000049454e44ae426082"
)


def test_pictures_follow_the_step_slider_and_markup_is_only_offered(page: Any, logged: Any) -> None:
    for step, mime, content in ((1, "image/png", PIXEL), (2, "image/svg+xml", b"<svg/>")):
        digest = hashlib.sha256(content).hexdigest()
        sent = logged.client.put(f"/parts/{digest}?offset=0", content=content)
        assert sent.status_code in (200, 201)
        about = {"kind": "image", "mime": mime, "bytes": len(content), "caption": HOSTILE}
        about["parts"] = [{"sha256": digest, "bytes": len(content)}]
        logged.send(
            RUN, [{"type": "media", "time": 1.7e9, "step": step, "name": "sample", **about}]
        )
    open_run(page, logged, "#media")
    expect(page.get_by_role("link", name="image/svg+xml")).to_be_visible()
    assert page.locator("img.media").count() == 0
    page.get_by_label("Step").press("ArrowLeft")
    picture = page.locator("img.media")
    expect(picture).to_have_js_property("naturalWidth", 1)
    expect(page.locator("figcaption")).to_contain_text(HOSTILE)


def test_what_the_run_printed_is_searched_and_is_no_sample(page: Any, logged: Any) -> None:
    # As the client writes it: whole lines, without a line end behind the last.
    for step, text in enumerate(["first\nsecond line", "third"]):
        logged.record(RUN, "text", step=step, name="run/console", text=text)
    logged.record(RUN, "text", step=1, name="run/environment", text="commit abc")
    logged.record(RUN, "text", step=0, name="sample", text="a sample")
    open_run(page, logged, "#samples")
    expect(page.locator(".sample")).to_have_text(["a sample"])
    page.get_by_role("tab", name="Log").click()
    console = page.locator(".sample").first
    expect(console).to_have_text("first\nsecond line\nthird", use_inner_text=True)
    page.get_by_label("Filter lines of run/console").fill("line")
    expect(console).to_have_text("second line")
    page.get_by_text("environment").click()
    expect(page.locator(".sample").last).to_have_text("commit abc")


def test_the_log_follows_the_run_and_has_earlier_lines(page: Any, logged: Any) -> None:
    open_run(page, logged)
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    log = page.get_by_role("tab", name="Log")
    expect(log).to_be_hidden()
    expect(page.get_by_role("tab", name="Media")).to_be_hidden()
    about = {"type": "text", "session": "s", "seq": 0, "time": 1.7e9, "name": "run/console"}
    chunks = range(1_000_000, 1_001_002)
    logged.send(RUN, [{**about, "step": step, "text": f"line {step}"} for step in chunks])
    log.click()
    record = page.locator(".record", has=page.locator("summary", has_text="console"))
    status, earlier = record.get_by_role("status"), record.get_by_role("button", name="Earlier")
    expect(status).to_have_text("the last 1,000 lines")
    chunks = range(1_001_002, 1_001_050)  # more than one look for new ones finds
    logged.send(RUN, [{**about, "step": step, "text": f"line {step}"} for step in chunks])
    expect(status).to_have_text("the last 1,048 lines")
    with page.expect_download() as download:
        record.get_by_role("button", name="Save").click()
    printed = [f"line {step}" for step in range(1_000_000, 1_001_050)]
    assert download.value.path().read_text().splitlines() == printed
    expect(status).to_have_text("1,050 lines")
    expect(earlier).to_be_hidden()
    assert record.locator(".sample").text_content().splitlines() == printed
    # An earlier session, synced late: its chunks have lower steps than all that were there.
    late = [f"early {step}" for step in range(1_050)]
    logged.send(RUN, [{**about, "step": step, "text": text} for step, text in enumerate(late)])
    expect(status).to_have_text("2,100 lines")
    assert record.locator(".sample").text_content().splitlines() == late + printed
    logged.record(RUN, "text", step=1, name="run/exception", text="ValueError")
    expect(page.locator(".record summary").first).to_have_text("exception")
    expect(page.locator(".sample").first).to_have_text("ValueError")
    page.reload()
    expect(status).to_have_text("the last 1,000 lines")
    logged.send(RUN, [{**about, "step": 1_050, "text": "early 1050"}])
    logged.send(RUN, [{**about, "step": 1_001_050, "text": "line 1001050"}])
    expect(status).to_have_text("the last 1,001 lines")  # the other one is among the earlier ones
    for number in ("the last 2,001", "2,102"):
        earlier.click()
        expect(status).to_have_text(f"{number} lines")
    expect(earlier).to_be_hidden()
    assert record.locator(".sample").text_content().splitlines()[1_050:1_052] == [
        "early 1050",
        "line 1000000",
    ]
    expect(earlier).to_be_hidden()


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
