"""The report in Chromium: light and dark, wide and narrow, with nothing fetched or run."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from archerchat.files import write_json
from archerchat.home import Home
from archerchat.planning.gpus import Prices
from archerchat.report.report import build_training_report
from archerchat.report.runs import gather

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
    names = [*(f"task_{i}" for i in range(9)), "bigbench_language_identification"]
    figures = {"task_type": "", "random_baseline": 0.3, "examples": 9, "seconds": 1}
    tasks = [figures | {"label": name, "correct": i} for i, name in enumerate(names)]
    options = {"max_per_task": None, "max_length": None}
    result = {"core": 0.1, "tasks": tasks, "step": 4, "options": options}
    write_json(home.eval_dir("base", "d8") / "core_4.json", result)
    page, _ = build_training_report(*gather(home, "d8"), Prices()).write(tmp_path / "report")
    return page


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
    # No text leaves its chart, whatever the fonts of this machine; no line its frame.
    outside = page.evaluate(
        """() => [...document.querySelectorAll('svg.chart')].flatMap((chart) => {
            const card = chart.getBoundingClientRect();
            return [...chart.querySelectorAll('text, path')].filter((part) => {
                const box = part.getBoundingClientRect();
                return part.tagName === 'text'
                    && (box.left < card.left || box.right > card.right
                        || box.top < card.top || box.bottom > card.bottom);
            }).map((part) => part.textContent);
        })"""
    )
    assert outside == []
    shades = page.evaluate(
        """() => {
            const body = getComputedStyle(document.body);
            const shade = (color) =>
                color.match(/[0-9]+/g).slice(0, 3).reduce((sum, part) => sum + +part, 0) / 3;
            return [shade(body.backgroundColor), shade(body.color)];
        }"""
    )
    back, ink = shades
    assert (back > 200) == (scheme == "light")
    assert abs(back - ink) > 90
    context.close()


def test_a_value_shows_under_the_pointer(browser: Any, page_file: Path) -> None:
    page = browser.new_page()
    page.set_default_timeout(10_000)
    page.goto(page_file.as_uri())
    chart = page.locator("svg.chart", has_text="Throughput").first
    point = chart.locator("g.value").nth(20)
    assert (point.locator("title").text_content() or "").startswith("256 at")
    mark = point.locator("use")
    assert mark.evaluate("e => getComputedStyle(e).opacity") == "0"
    point.hover()
    assert mark.evaluate("e => getComputedStyle(e).opacity") == "1"
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_chart_can_be_read_as_a_file(browser: Any, page_file: Path, scheme: str) -> None:
    """As an image of the Markdown: light ink on dark, dark ink on light."""
    picture = sorted((page_file.parent / "charts").glob("*.svg"))[0]
    page = browser.new_page(color_scheme=scheme)
    page.set_default_timeout(10_000)
    source = "data:image/svg+xml," + quote(picture.read_text())
    page.set_content(f'<meta name="color-scheme" content="light dark"><img src="{source}">')
    darkest, lightest = page.evaluate(
        """async () => {
            const image = document.querySelector('img');
            await image.decode();
            const canvas = document.createElement('canvas');
            [canvas.width, canvas.height] = [image.width, image.height];
            const context = canvas.getContext('2d');
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, image.width, image.height).data;
            const shades = [];
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] > 250) shades.push((data[i] + data[i + 1] + data[i + 2]) / 3);
            return [Math.min(...shades), Math.max(...shades)];
        }"""
    )
    assert darkest < 60 if scheme == "light" else lightest > 195
    page.close()
