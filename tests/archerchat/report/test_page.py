"""The report in Chromium: light and dark, wide and narrow, with nothing fetched or run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from archerchat.home import Home
from archerchat.report.files import write_report
from archerchat.report.spending import Prices
from archerchat.report.training_report import build_training_report, gather

pytestmark = pytest.mark.browser
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page_file(home: Home, session: Callable[..., None], tmp_path: Path) -> Path:
    text = '</pre><script>document.title="run"</script><img src=x onerror="document.title=1">' * 3
    session(home, "d8", range(400), text=text)
    document = build_training_report(gather(home, "d8"), Prices())
    return write_report(document, tmp_path / "report").html


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", SIZES)
def test_the_page(browser: Any, page_file: Path, scheme: str, size: str) -> None:
    width, height = SIZES[size]
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": height})
    page = context.new_page()
    page.set_default_timeout(10_000)
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    assert page.title() == "Training report: d8"
    assert said == []
    assert asked == [page_file.as_uri()]
    # Tables scroll in their own place; the page never does sideways.
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("pre", has_text="onerror").first.is_visible()
    shades = page.evaluate(
        """() => [document.body, document.querySelector('.chart text')].map((element) => {
            const style = getComputedStyle(element);
            const color = element === document.body ? style.backgroundColor : style.fill;
            return color.match(/[0-9]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 3;
        })"""
    )
    back, ink = shades
    assert (back > 200) == (scheme == "light")
    assert abs(back - ink) > 90
    context.close()


def test_a_value_shows_under_the_pointer(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.goto(page_file.as_uri())
    chart = page.locator("figure", has_text="Tokens per second").locator("svg.chart")
    value = chart.locator("g", has_text="256 at").nth(20).locator("text.value")
    assert value.evaluate("e => getComputedStyle(e).opacity") == "0"
    chart.locator("g", has_text="256 at").nth(20).locator("rect").hover()
    assert value.evaluate("e => getComputedStyle(e).opacity") == "1"
    page.close()


def test_a_chart_of_the_markdown_is_a_picture_by_itself(browser: Any, page_file: Path) -> None:
    picture = sorted((page_file.parent / "charts").glob("*.svg"))[0]
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.goto(picture.as_uri())
    box = page.evaluate("document.querySelector('path.curve').getBoundingClientRect().width")
    assert box > 100
    page.close()
