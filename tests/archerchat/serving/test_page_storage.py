"""What the page keeps, through imports, a full storage, other tabs and closing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi")

from archerchat.tasks.collected import JsonlTask

pytestmark = pytest.mark.browser

CHATS = "**/v1/chat/completions"
SAVED = """() => Object.entries(localStorage)
    .filter(([key]) => key.startsWith("archerchat.conversation."))
    .map(([, text]) => JSON.parse(text))"""
FILL = """() => {
    localStorage.filler = "";
    for (let n = 2 ** 23; n >= 1; n /= 2) try { localStorage.filler += "x".repeat(n); } catch {}
}"""
OF_0_2 = """(all) => {
    localStorage["archerchat.conversations"] = JSON.stringify(all);
}"""
NO_ANSWER = """() => {
    window.fetch = (url, { signal }) => new Promise((resolve, fail) => {
        signal.onabort = () => fail(signal.reason);
    });
}"""
HALF_AN_ANSWER = """() => {
    window.fetch = async (url, { signal }) => new Response(new ReadableStream({ start(stream) {
        const chunk = JSON.stringify({ choices: [{ delta: { content: "half" } }] });
        stream.enqueue(new TextEncoder().encode(`data: ${chunk}\\n\\n`));
        signal.onabort = () => stream.error(signal.reason);
    } }));
}"""


def answer(page: Any, text: str = "yes") -> None:
    """Have every question answered with this text, by no model."""
    body = "data: " + json.dumps({"choices": [{"delta": {"content": text}}]}) + "\n\n"
    page.unroute(CHATS)
    page.route(CHATS, lambda route: route.fulfill(content_type="text/event-stream", body=body))


def open_page(page: Any) -> None:
    page.reload()
    page.wait_for_selector("#model option", state="attached")


@pytest.fixture
def chats(page: Any) -> Iterator[Any]:
    """The page, without conversations and settings."""
    page.evaluate("localStorage.clear()")
    answer(page)
    open_page(page)
    yield page
    page.unroute(CHATS)
    assert page.problems == []


def send(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def ask(page: Any, text: str) -> None:
    """Ask in a conversation of its own."""
    page.keyboard.press("Alt+n")
    send(page, text)
    page.wait_for_selector("#send:text-is('Send')")


def in_list(page: Any, *titles: str) -> None:
    """Wait until these are the conversations of the list, newest first."""
    playwright = pytest.importorskip("playwright.sync_api")
    shown = playwright.expect(page.locator("#conversations .open"))
    shown.to_have_text(list(titles), timeout=60_000)


def delete(page: Any, title: str) -> None:
    row = page.locator("#conversations li", has_text=title).first
    row.locator(".remove").evaluate("(button) => { window.confirm = () => true; button.click(); }")


def add_file(page: Any, *lines: Any) -> str:
    """Import a file of these lines; return what the page says about it."""
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    page.evaluate("document.querySelector('#notice').textContent = ''")
    file = {"name": "a.jsonl", "mimeType": "application/jsonl", "buffer": text.encode()}
    page.set_input_files("#file", file)
    page.wait_for_selector("#notice:not(:empty)")
    return str(page.inner_text("#notice"))


def exchange(question: str, answer: str = "yes") -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_an_import_is_added_whole_or_not_at_all(chats: Any) -> None:
    ask(chats, "mine")
    assert "250 conversations were added" in add_file(chats, *[exchange("theirs")] * 250)
    refused = {
        "the browser has no room left": [exchange("small"), exchange("x" * 6_000_000)],
        "line 2: ": [exchange("good"), '{"messages": '],
        "line 1: assistant is out of turn": [exchange("q")[1:]],
        "line 1: not all parts of user are text": [[{"role": "user", "content": None}]],
        "line 1: there are no messages": [{"messages": []}],
    }
    for problem, lines in refused.items():
        assert f"Nothing was added: {problem}" in add_file(chats, *lines)
    system = {"role": "system", "content": "Answer in French."}
    add_file(chats, {"messages": [system, *exchange("their question", "oui")]})
    open_page(chats)
    in_list(chats, "their question", *["theirs"] * 250, "mine")
    assert chats.inner_text(".user .body") == "Answer in French.\n\ntheir question"


def test_a_full_storage_keeps_what_it_has(chats: Any) -> None:
    ask(chats, "one")
    chats.evaluate(FILL)
    ask(chats, "two")
    assert "Not saved: the browser has no room left" in chats.inner_text("#notice")
    chats.click("#settings-button")
    chats.select_option("#fields label:has-text('Theme') select", "dark")
    chats.click("#settings-close")
    assert chats.evaluate("document.documentElement.dataset.theme") == "dark"
    in_list(chats, "two", "one")
    assert [each["title"] for each in chats.evaluate(SAVED)] == ["one"]
    delete(chats, "one")
    assert chats.inner_text("#notice") == ""
    open_page(chats)
    in_list(chats, "two")


def test_the_page_works_where_storage_is_blocked(chats: Any) -> None:
    page = chats.context.browser.new_page()
    page.on("pageerror", lambda error: chats.problems.append(str(error)))
    page.add_init_script(
        """Object.defineProperty(window, "localStorage",
            { get() { throw new DOMException("blocked", "SecurityError"); } })"""
    )
    answer(page)
    page.goto(chats.url)
    page.wait_for_selector("#model option", state="attached")
    assert "until you leave" in page.inner_text(".empty")
    for title in ("one", "two"):
        ask(page, title)
    page.select_option("#compare", "tiny:base")
    in_list(page, "two", "one")
    delete(page, "two")
    in_list(page, "New conversation", "one")
    page.close()


def test_a_page_that_hangs_ends_with_its_browser(chats: Any, run_browser: Any) -> None:
    """So that no test of a page can wait for ever."""
    with (
        run_browser(chats.context.browser.browser_type, limit_seconds=1) as browser,
        pytest.raises(Exception, match=r"closed|crashed"),
    ):
        browser.new_page().evaluate("() => { for (;;); }")
    chats.evaluate("alert('a dialog does not keep the page from going on')")
    assert len(chats.problems) == 1
    chats.problems.clear()


def test_tabs_keep_each_others_conversations(chats: Any) -> None:
    other = chats.context.new_page()
    answer(other)
    other.goto(chats.url)
    other.wait_for_selector("#model option", state="attached")
    ask(chats, "here")
    in_list(other, "here", "New conversation")
    ask(other, "there")
    in_list(chats, "there", "here")
    names = {"top_k": (chats, "Top-k"), "max_tokens": (other, "Tokens per answer")}
    for name, (page, label) in names.items():
        page.locator(f"#fields label:has-text('{label}') input").evaluate(
            "(input) => { input.value = 5; input.onchange(); }"
        )
        for each in (chats, other):  # a tab learns of it a little later
            each.wait_for_function(
                "(name) => localStorage['archerchat.settings']?.includes(name)", arg=name
            )
    settings = json.loads(chats.evaluate("localStorage['archerchat.settings']"))
    assert settings == {"top_k": 5, "max_tokens": 5}
    # Both answer the conversation "here": it becomes two, and neither question is lost.
    other.locator("#conversations .open:text-is('here')").evaluate("(open) => open.click()")
    chats.evaluate(NO_ANSWER)
    send(chats, "second here")
    chats.wait_for_selector("#send:text-is('Stop')")
    send(other, "second there")
    in_list(chats, "here", "there", "here")
    chats.keyboard.press("Escape")
    in_list(other, "here", "here", "there")
    asked = [str(each["nodes"]) for each in chats.evaluate(SAVED) if each["title"] == "here"]
    assert sorted(("second here" in each, "second there" in each) for each in asked) == [
        (False, True),
        (True, False),
    ]
    # What is deleted in one tab is not saved again by another, which was to answer it.
    send(chats, "third here")
    chats.wait_for_selector("#send:text-is('Stop')")
    delete(other, "here")
    delete(other, "here")
    in_list(chats, "New conversation", "there")
    chats.wait_for_selector("#send:text-is('Send')")
    open_page(chats)
    in_list(chats, "there")
    other.close()


def test_an_edit_stays_on_its_branch_when_another_tab_shows_a_different_one(chats: Any) -> None:
    ask(chats, "first")
    send(chats, "second")
    chats.click(".message.user >> nth=1 >> text=Edit")
    other = chats.context.new_page()
    answer(other)
    other.goto(chats.url)
    other.click(".message.user >> nth=0 >> text=Edit")
    send(other, "first there")
    chats.wait_for_selector(".message.user .body >> text=first there")
    assert chats.input_value("#prompt") == "second"
    send(chats, "second here")
    chats.wait_for_selector(".message.user .body >> text=second here")
    assert chats.locator(".user .body").all_inner_texts() == ["first", "second here"]
    other.close()


def test_an_answer_stays_with_its_question_and_outlives_the_page(chats: Any) -> None:
    ask(chats, "older")
    ask(chats, "asked")
    chats.evaluate(HALF_AN_ANSWER)
    send(chats, "and then")
    chats.wait_for_selector(".assistant .body >> text=half")
    chats.locator("#conversations .open:text-is('older')").evaluate("(open) => open.click()")
    chats.wait_for_selector("#send:text-is('Send')")
    assert chats.locator(".assistant .body").all_inner_texts() == ["yes"]
    open_page(chats)
    in_list(chats, "asked", "older")
    assert chats.locator(".assistant .body").all_inner_texts() == ["yes", "half"]
    chats.evaluate(HALF_AN_ANSWER)
    send(chats, "before the page is closed")
    chats.wait_for_selector(".assistant .body >> nth=2 >> text=half")
    open_page(chats)
    assert chats.locator(".assistant .body").all_inner_texts() == ["yes", "half", "half"]
    chats.keyboard.press("Alt+n")
    chats.click("[data-mode=text]")
    chats.locator("#text").press_sequentially("typed")
    open_page(chats)
    assert chats.input_value("#text") == "typed"


def test_what_is_exported_can_be_learned(chats: Any, tmp_path: Path) -> None:
    """A question without an answer, or with a blank one, is left out."""
    ask(chats, "answered")
    chats.unroute(CHATS)
    chats.route(CHATS, lambda route: route.fulfill(status=500, body="{}"))
    send(chats, "failed")
    chats.wait_for_selector("#notice.error")
    ask(chats, "never answered")
    answer(chats, " \n")
    ask(chats, "blank")
    with chats.expect_download() as download:
        chats.locator("#export").evaluate("(button) => button.click()")
    path = tmp_path / "conversations.jsonl"
    download.value.save_as(path)
    task = JsonlTask(path)
    assert [each["messages"][0]["content"] for each in task] == ["answered"]
    assert [len(each["messages"]) for each in task] == [2]


def conversation(title: str, updated: int = 0, text: str = "") -> dict[str, Any]:
    """A conversation with this text before any message, as the browser stores it."""
    node = {"role": "user", "parts": [{"type": "text", "text": text or title}], "parent": -1}
    more = {"nodes": [node], "leaf": 0, "text": "", "updated": updated}
    return {"id": title.split()[0], "mode": "chat", "title": title} | more


@pytest.mark.parametrize("is_full", [False, True])
def test_conversations_of_the_first_release_are_still_there(chats: Any, is_full: bool) -> None:
    """It kept all of them in one entry. What does not fit beside it stays there."""
    titles = [str(number) for number in range(50, 0, -1)]
    chats.evaluate("localStorage.clear()")
    chats.evaluate(OF_0_2, [conversation(each, int(each), "x" * 100_000) for each in titles])
    if is_full:
        chats.evaluate(FILL)
    for _ in range(2):
        open_page(chats)
        in_list(chats, *titles)
    if is_full:
        chats.wait_for_selector("#notice >> text=Not saved: the browser has no room left")
        delete(chats, titles.pop(0))
        assert chats.inner_text("#notice") == ""
        open_page(chats)
        in_list(chats, *titles)
    assert chats.inner_text("#notice") == ""
    assert len(chats.evaluate(SAVED)) == len(titles)
    assert "archerchat.conversations" not in chats.evaluate("Object.keys(localStorage)")


def test_an_open_tab_of_the_first_release_brings_back_nothing_older(chats: Any) -> None:
    """It writes its whole list again; the newer of two versions counts."""
    chats.evaluate("localStorage.clear()")
    chats.evaluate(OF_0_2, [conversation("a", 1), conversation("b", 2)])
    open_page(chats)
    chats.evaluate(OF_0_2, [conversation("a there", 4), conversation("b there", 2)])
    open_page(chats)
    in_list(chats, "a there", "b")
    chats.evaluate(OF_0_2, [conversation("a there later", 3), conversation("b there", 1)])
    for _ in range(2):
        open_page(chats)
        in_list(chats, "a there", "b")
    assert len(chats.evaluate(SAVED)) == 2
