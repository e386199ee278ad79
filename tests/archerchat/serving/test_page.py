"""The page in a browser: what a reader does, and what a hostile answer cannot do."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("fastapi")

from archerchat.serving.app import PAGE
from archerchat.tasks.conversation import check_messages

HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> **bold** [a](javascript:alert(3)) "
    "[b](https://example.org)\n\n```html\n<b>code</b>\n```\n\n| a | b |\n|---|---|\n| 1 | <i> |"
)


def test_the_page_is_small_and_loads_nothing_from_elsewhere(client: Any) -> None:
    policy = client.get("/").headers["content-security-policy"]
    assert "default-src 'none'; script-src 'self'; style-src 'self'" in policy
    assert client.get("/page/app.js").headers["content-security-policy"] == policy
    for path in PAGE.glob("*.js"):
        assert "innerHTML" not in path.read_text(encoding="utf-8")


LIBRARIES = ("marked", "purify", "highlight", "katex")
needs_libraries = pytest.mark.skipif(
    not all((PAGE / "vendor" / f"{name}.js").is_file() for name in LIBRARIES),
    reason="the build fetched no libraries: no npm registry then",
)


@pytest.fixture(name="page")
def fresh_page(page: Any) -> Any:
    """The page without conversations and settings: no test depends on those before it."""
    page.evaluate("localStorage.clear()")
    page.reload()
    page.wait_for_selector("#model option", state="attached")
    page.problems.clear()
    return page


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Any) -> None:
    page.wait_for_selector("#send:not(:text-is('Stop'))")


@pytest.mark.browser
def test_a_conversation_has_branches_and_survives_a_reload(page: Any) -> None:
    ask(page, "ab")
    page.wait_for_selector(".message.assistant .tools >> text=tokens/s")
    answered(page)
    page.click(".message.assistant >> text=Again")
    page.wait_for_selector(".message.assistant >> text=2/2")
    answered(page)
    page.click(".message.user >> text=Edit")
    ask(page, "cd")
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
    page.select_option("#model", "tiny:base")
    page.fill("#text", "ab")
    page.click("#send")
    page.wait_for_selector("#tokens .token >> nth=3")
    page.hover("#tokens .token >> nth=0")
    whole = page.locator("#alternatives button", has_not_text="\ufffd").last
    chosen = whole.locator("span").first.inner_text().replace("·", " ")
    whole.click()
    page.wait_for_selector("#alternatives", state="detached")
    answered(page)
    assert page.input_value("#text").startswith(f"ab{chosen}")
    page.select_option("#model", "tiny:sft")
    page.click("[data-mode=chat]")
    ask(page, "ab")
    page.wait_for_selector(".message.assistant .tools >> text=tokens/s")
    page.click(".message.assistant .token >> nth=0")
    page.locator("#alternatives button", has_not_text="\ufffd").last.click()
    page.wait_for_selector(".message.assistant >> text=2/2")
    answered(page)
    page.click("#settings-button")
    page.select_option("#fields label:has-text('Token view') select", "off")
    page.click("#settings-close")
    assert page.problems == []


@pytest.mark.browser
def test_two_models_answer_side_by_side(page: Any) -> None:
    """Each goes on with its own answers, and with its own text."""
    page.select_option("#compare", "tiny:base")
    page.click("#menu")
    page.click("#new")
    page.click("[data-mode=chat]")
    for message in ("ab", "cd"):
        ask(page, message)
        page.wait_for_selector(f".column >> nth=1 >> .message.user >> text={message}")
        answered(page)
    for side, model in (("leaf", "tiny:sft"), ("other", "tiny:base")):
        column = page.locator(f"[data-side={side}]")
        assert column.locator(".message.user .body").all_inner_texts() == ["ab", "cd"]
        assert column.locator(f".assistant .tools >> text={model} ·").count() == 2
    page.click("[data-side=other] .assistant >> nth=1 >> text=Again")
    page.wait_for_selector("[data-side=other] .assistant >> nth=1 >> text=2/2")
    answered(page)
    assert page.locator("[data-side=leaf] .assistant >> text=2/2").count() == 0
    page.reload()
    page.wait_for_selector("[data-side=other] .assistant >> nth=1 >> text=2/2")
    page.click("[data-mode=text]")
    page.fill("#text", "ab")
    page.press("#text", "Control+Enter")
    page.wait_for_selector("#undo:visible")
    assert page.input_value("#text-other").startswith("ab")
    assert len(page.input_value("#text-other")) > 2
    page.select_option("#compare", "")
    assert page.problems == []


@pytest.mark.browser
def test_an_answer_is_stopped_and_conversations_are_searched_and_kept(
    page: Any, tmp_path: Any
) -> None:
    ask(page, "ab")
    page.wait_for_selector(".message.assistant .tools >> text=tokens/s")
    answered(page)
    page.click("#menu")
    page.click("#new")
    page.route("**/v1/chat/completions", lambda route: None)  # no answer comes
    ask(page, "needle in hay")
    page.wait_for_selector("#send:text-is('Stop')")
    page.keyboard.press("Escape")
    answered(page)
    page.unroute("**/v1/chat/completions")
    assert page.locator(".message").count() == 1
    page.click("#menu")
    page.fill("#search", "needle")
    assert page.locator("#conversations li").count() == 1
    page.fill("#search", "")
    page.set_viewport_size({"width": 1000, "height": 800})  # where it shows under the pointer
    page.focus("#conversations .remove")
    assert page.evaluate("document.activeElement.className") == "remove"
    page.set_viewport_size({"width": 390, "height": 800})
    before = page.locator("#conversations li").count()
    with page.expect_download() as download:
        page.click("#export")
    path = tmp_path / "conversations.jsonl"
    download.value.save_as(path)
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert lines
    for line in lines:
        check_messages(line)
    page.set_input_files("#file", path)
    page.wait_for_selector(f"#notice >> text={len(lines)} conversations were added")
    assert page.locator("#conversations li").count() == before + len(lines)
    page.keyboard.press("Alt+n")
    assert page.evaluate("document.activeElement.id") in ("prompt", "text")
    assert page.problems == []


@pytest.mark.browser
def test_a_browser_that_does_not_know_light_dark_shows_the_light_theme(page: Any) -> None:
    style = (PAGE / "style.css").read_text(encoding="utf-8")
    colours = re.findall(r"(--[a-z-]+): light-dark\((.+?), (.+?)\)", style)
    older = style.replace("light-dark(", "unknown(")
    page.route("**/style.css", lambda route: route.fulfill(content_type="text/css", body=older))
    page.reload()
    get = "name => getComputedStyle(document.documentElement).getPropertyValue(name)"
    assert [(name, page.evaluate(get, name)) for name, _, _ in colours] == [
        (name, light) for name, light, _ in colours
    ]
    assert page.evaluate(get, "color-scheme") == "light"
    page.unroute("**/style.css")
    page.reload()
    assert page.evaluate(get, "color-scheme") == "light dark"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(251, 251, 249)"
    page.emulate_media(color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(22, 24, 22)"
    page.emulate_media(color_scheme=None)


def show_answer(page: Any, text: str) -> None:
    """Add a conversation with this answer, and open it."""
    page.evaluate(
        """async (text) => {
            const store = await import('/page/store.js');
            store.fromLines(JSON.stringify({messages: [{role: 'user', content: '<i>'},
                {role: 'assistant', content: text}]}));
        }""",
        text,
    )
    page.reload()
    page.wait_for_selector(".message.assistant")


@needs_libraries
@pytest.mark.browser
def test_hostile_answers_are_text(page: Any) -> None:
    show_answer(page, HOSTILE)
    page.wait_for_selector(".message.assistant strong")
    assert page.locator("#messages :is(img, script, i, b)").count() == 0
    assert page.eval_on_selector_all("#messages a", "a => a.map(x => x.href)") == [
        "https://example.org/"
    ]
    assert "<img src=x onerror=alert(1)>" in page.inner_text(".message.assistant")
    assert "<b>code</b>" in page.inner_text("#messages pre")
    assert page.problems == []


@needs_libraries
@pytest.mark.browser
def test_code_is_highlighted_formulas_are_set_and_the_page_is_light(page: Any) -> None:
    show_answer(
        page, "$a^2$ costs $5, not $6:\n\n$$\\frac{1}{2}$$\n\n```python\ndef f(): pass\n```"
    )
    page.wait_for_selector("#messages .hljs-keyword")
    page.wait_for_selector("#messages math mfrac", state="attached")
    assert page.locator("#messages math").count() == 2
    assert sum(page.first_paint.values()) < 300_000
    assert not any("katex" in url or "highlight" in url for url in page.first_paint)
    assert page.problems == []
