"""The page in a browser: what a reader does, and what a hostile answer cannot do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("fastapi")

from archerchat.runtime import build_runtime
from archerchat.serving.app import PAGE, build_app
from archerchat.serving.config import ServeConfig

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> **bold** [a](javascript:alert(3)) "
    "[b](https://example.org)\n\n```html\n<b>code</b>\n```\n\n| a | b |\n|---|---|\n| 1 | <i> |"
)


def test_the_page_is_small_and_loads_nothing_from_elsewhere(client: Any) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert client.get("/page/app.js").headers["content-security-policy"] == policy
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 300_000
    for path in PAGE.glob("*.js"):
        assert "innerHTML" not in path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(served_home: Any, listen: Any) -> Iterator[Any]:
    """The page of a phone's width, open on a server."""
    playwright = pytest.importorskip("playwright.sync_api")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no chromium on PATH")
    app = build_app(served_home, build_runtime("cpu", "float32"), ServeConfig())
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with listen(app) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=path, args=sandbox)
        found = browser.new_page(viewport={"width": 390, "height": 800})
        found.problems = []
        found.on("pageerror", lambda error: found.problems.append(str(error)))
        found.on("dialog", lambda dialog: found.problems.append(dialog.message))
        found.goto("http://{}:{}/".format(*address))
        found.wait_for_selector("#model option", state="attached")
        yield found
        browser.close()


def answered(page: Any) -> None:
    page.wait_for_selector("#send:not(:text-is('Stop'))")


@pytest.mark.browser
def test_a_conversation_has_branches_and_survives_a_reload(page: Any) -> None:
    page.fill("#prompt", "ab")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".message.assistant .tools >> text=tokens/s")
    answered(page)
    page.click(".message.assistant >> text=Again")
    page.wait_for_selector(".message.assistant >> text=2/2")
    answered(page)
    page.click(".message.user >> text=Edit")
    page.fill("#prompt", "cd")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".message.user >> text=2/2")
    answered(page)
    page.reload()
    page.click(".message.user >> text=‹")
    assert page.inner_text(".message.user .body") == "ab"
    assert page.locator(".message.assistant >> text=2/2").count() == 1
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.problems == []


@pytest.mark.browser
def test_a_text_is_continued_and_the_continuation_taken_back(page: Any) -> None:
    page.click("#menu")
    page.click("#new")
    page.select_option("#model", "tiny:base")
    page.fill("#text", "ab")
    page.click("#send")
    page.wait_for_selector("#undo:visible")
    assert page.input_value("#text").startswith("ab")
    assert len(page.input_value("#text")) > 2
    page.click("#undo")
    assert page.input_value("#text") == "ab"
    assert page.problems == []


@pytest.mark.browser
def test_a_token_shows_what_else_was_likely_and_goes_on_from_there(page: Any) -> None:
    page.click("#settings-button")
    page.select_option("#fields label:has-text('Token view') select", "on")
    page.click("#settings-close")
    page.fill("#text", "ab")
    page.click("#send")
    page.wait_for_selector("#tokens .token >> nth=3")
    first = page.inner_text("#tokens .token >> nth=0")
    page.click("#tokens .token >> nth=1")
    page.locator("#alternatives button").last.click()
    page.wait_for_selector("#alternatives", state="detached")
    answered(page)
    assert page.input_value("#text").startswith(f"ab{first}")
    page.select_option("#model", "tiny:sft")
    page.click("[data-mode=chat]")
    page.fill("#prompt", "ab")
    page.press("#prompt", "Enter")
    page.wait_for_selector(".message.assistant .tools >> text=tokens/s")
    page.click(".message.assistant .token >> nth=1")
    page.locator("#alternatives button").last.click()
    page.wait_for_selector(".message.assistant >> text=2/2")
    answered(page)
    page.click("#settings-button")
    page.select_option("#fields label:has-text('Token view') select", "off")
    page.click("#settings-close")
    assert page.problems == []


@pytest.mark.browser
def test_hostile_answers_are_text(page: Any) -> None:
    page.evaluate(
        """async (text) => {
            const store = await import('/page/store.js');
            store.fromLines(JSON.stringify({messages: [{role: 'user', content: '<i>'},
                {role: 'assistant', content: text}]}));
        }""",
        HOSTILE,
    )
    page.reload()
    page.wait_for_selector(".message.assistant strong")
    assert page.locator("#messages :is(img, script, i, b)").count() == 0
    assert page.eval_on_selector_all("#messages a", "a => a.map(x => x.href)") == [
        "https://example.org/"
    ]
    assert "<b>code</b>" in page.inner_text("#messages pre")
    assert page.problems == []
