"""The list of runs in a browser: what it shows, finds, sorts and changes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

playwright_api = pytest.importorskip("playwright.sync_api")
expect = playwright_api.expect
pytestmark = pytest.mark.browser

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"


@pytest.fixture
def listed(server: Any) -> Any:
    """Three runs, of which the middle one is the best."""
    for number, (name, loss) in enumerate([("d8", 3.0), ("d12", 2.5), ("d20", 2.75)]):
        run = f"listrun{number}"
        config = {"lr": 0.3 - number / 10, "depth": 12}
        tags = ["good"] if name == "d12" else []
        server.begin(run, name, tags=tags, time=1.7e9 + number, config=config)
        server.log(run, {"train/loss": {0: 9.0, 1: loss}})
    server.record("listrun0", "finish", status="finished")
    return server


def names(page: Any) -> list[str]:
    return page.locator("tbody .run-name").all_inner_texts()


def test_runs_are_listed_newest_first_with_status_and_last_values(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    assert names(page) == ["d20", "d12", "d8"]
    row = page.locator("tr", has_text="d8")
    expect(row.locator(".status")).to_have_text("finished")
    expect(page.locator("tr", has_text="d12").locator(".status")).to_have_text("running")
    assert row.locator("td[data-label='train/loss']").inner_text() == "3"


def test_any_column_sorts_both_ways(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    names = page.locator("tbody .run-name")
    head = page.get_by_role("button", name="train/loss")
    head.click()
    expect(names).to_have_text(["d12", "d20", "d8"])
    expect(page.locator("th", has_text="train/loss")).to_have_attribute("aria-sort", "ascending")
    head.click()
    expect(names).to_have_text(["d8", "d20", "d12"])
    page.get_by_role("button", name="Name").click()
    expect(names).to_have_text(["d8", "d12", "d20"])  # by number, not by letter
    page.get_by_role("button", name="lr").click()
    expect(names).to_have_text(["d20", "d12", "d8"])  # a key of the configuration
    page.reload()  # the address keeps it
    expect(names).to_have_text(["d20", "d12", "d8"])


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("d1", ["d12"]),
        ("tag:good", ["d12"]),
        ("train/loss<2.8", ["d20", "d12"]),
        ("train/loss < 2.8 -d12", ["d20"]),
        ("lr >= 0.3 OR tag:good", ["d12", "d8"]),
    ],
)
def test_the_search_box_takes_words_tags_and_conditions(
    page: Any, listed: Any, query: str, found: list[str]
) -> None:
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_role("searchbox").fill(query)
    expect(page.locator("tbody tr")).to_have_count(len(found))
    assert names(page) == found
    page.reload()  # the address keeps the search
    expect(page.locator("tbody tr")).to_have_count(len(found))


def test_a_wrong_condition_is_explained(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    page.get_by_role("searchbox").fill("train/los<3")
    expect(page.get_by_role("alert")).to_contain_text("did you mean train/loss?")
    expect(page.locator("tbody tr")).to_have_count(3)
    page.get_by_role("searchbox").fill("train/loss<9")
    expect(page.get_by_role("alert")).to_be_hidden()
    page.locator("summary[title='What can be searched for']").click()
    expect(page.locator(".picker[open] pre")).to_contain_text("d12 OR d20")


def test_columns_are_chosen_and_kept_in_a_saved_view(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    heads = page.locator("thead .sort")
    expect(heads).to_have_text(
        ["Name", "Status", "Created↓", "lr", "train/loss", "Group", "Tags", "Duration", "Notes"]
    )
    page.locator("summary", has_text="Columns").click()
    page.get_by_label("Figure of train/loss").select_option("max:")
    expect(heads).to_contain_text(["train/loss highest"])
    expect(page.locator("tr[data-run=listrun0] td[data-label='max:train/loss']")).to_have_text("9")
    page.locator(".picker-rows").get_by_label("depth").check()
    expect(heads).to_contain_text(["depth"])
    page.locator("summary", has_text="Columns").click()
    page.get_by_role("searchbox", name="Search runs").fill("tag:good")
    expect(page.locator("tbody tr")).to_have_count(1)
    page.locator("summary", has_text="Views").click()
    page.get_by_role("button", name="Save this view").click()
    page.get_by_role("dialog").locator("input").fill("good ones")
    page.get_by_role("button", name="Save", exact=True).click()
    expect(page.locator("summary", has_text="Views (1)")).to_be_visible()
    page.evaluate("() => localStorage.clear()")
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    page.locator("summary", has_text="Views (1)").click()
    page.get_by_role("link", name="good ones").click()
    expect(page.locator("tbody tr")).to_have_count(1)
    expect(heads).to_contain_text(["train/loss highest"])


def test_many_runs_are_tagged_grouped_and_exported_at_once(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    page.get_by_label("Select all runs").check()
    page.get_by_role("button", name="Tag", exact=True).click()
    page.get_by_label("Add").fill("ladder, new")
    page.get_by_label("Remove").fill("good")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("tr[data-run=listrun1] .tag")).to_have_text(["ladder", "new"])
    page.locator(".bulk").get_by_role("button", name="Group").click()
    page.get_by_role("dialog").locator("input").fill("all of them")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("tr[data-run=listrun0] td.cell-group")).to_have_text("all of them")
    with page.expect_download() as started:
        page.get_by_role("button", name="Export table").click()
    rows = started.value.path().read_text().splitlines()
    assert rows[0].startswith('"run","name","status"')
    assert len(rows) == 4
    page.locator(".bulk").get_by_role("button", name="Delete").click()
    expect(page.locator("tbody tr")).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.locator("tbody tr")).to_have_count(3)


def test_a_list_that_cannot_be_read_again_stays_whole(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    page.get_by_label("Select all runs").check()
    page.route("**/api/v1/runs?*", lambda route: route.abort())
    page.get_by_role("searchbox").fill("d")
    expect(page.locator(".toast-error")).to_contain_text("does not answer")
    with page.expect_download() as started:
        page.get_by_role("button", name="Export table").click()
    assert len(started.value.path().read_text().splitlines()) == 4


def test_a_click_on_a_tag_finds_the_runs_that_have_it(page: Any, listed: Any) -> None:
    tags = ["two words", "depth=12", "name:d12", "d*", 'a "b" c']
    body = {"runs": ["listrun0"], "changes": {"tags": tags}}
    assert listed.client.patch("/runs", json=body).status_code == 200
    body = {"runs": ["listrun1"], "changes": {"tags": ["two", "dx"]}}
    assert listed.client.patch("/runs", json=body).status_code == 200
    page.goto(listed.url)
    found = page.locator("tbody .run-name")
    for tag in tags:
        page.get_by_role("searchbox", name="Search runs").fill("")
        expect(found).to_have_count(3)
        page.get_by_role("button", name=tag, exact=True).click()
        expect(found).to_have_text(["d8"])
    for path in ("/runs/listrun0", "/compare?runs=listrun0,listrun1#table"):
        page.goto(listed.url + path)
        page.get_by_role("button", name="two words", exact=True).click()
        page.wait_for_url("**/?q=tag*")
        expect(found).to_have_text(["d8"])


def test_whether_more_is_better_is_in_whole_words_of_a_name(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    better = """async (names) => {
      const { isMoreBetter } = await import("/static/js/format.js");
      return names.filter(isMoreBetter);
    }"""
    names = json.loads((Path(__file__).parents[1] / "metric_names.json").read_text())
    more, less = names["more_is_better"], names["less_is_better"]
    assert page.evaluate(better, more + less) == more


def test_letters_move_through_the_list(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    for key in "jjx":
        page.keyboard.press(key)
    expect(page.get_by_label("Select d12")).to_be_checked()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Select d12")).not_to_be_checked()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_contain_text("compare the selected runs")
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.get_by_role("searchbox", name="Search runs")).to_be_focused()


def test_tags_groups_and_notes_are_edited_in_place(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    row = page.locator("tr[data-run=listrun0]")
    row.get_by_label(re.compile("^Edit tags")).click()
    page.keyboard.type("slow, odd")
    page.keyboard.press("Enter")
    expect(row.locator(".tag")).to_have_text(["slow", "odd"])
    row.get_by_label(re.compile("^notes")).click()
    page.keyboard.type("too small")
    page.keyboard.press("Control+Enter")
    row.get_by_label(re.compile("^group")).click()
    page.keyboard.type("ladder")
    page.keyboard.press("Escape")
    expect(row).to_contain_text("too small")
    saved = listed.client.get("/runs/listrun0").json()
    assert saved["tags"] == ["slow", "odd"]
    assert saved["notes"] == "too small"
    assert not saved["group"]  # Escape gave that up


def test_delete_can_be_undone_and_archive_moves_away(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    row = page.locator("tr[data-run=listrun1]")
    row.hover()
    row.get_by_role("button", name="Delete").click()
    expect(row).to_have_count(0)
    assert listed.client.get("/runs").json()["total"] == 2
    page.get_by_role("button", name="Undo").click()
    expect(row).to_have_count(1)
    row.hover()
    row.get_by_role("button", name="Archive").click()
    expect(row).to_have_count(0)
    page.get_by_label("archived").check()
    expect(page.locator("tbody tr")).to_have_count(1)
    assert names(page) == ["d12"]


def test_chosen_runs_are_compared(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    page.get_by_label("Select d12").check()
    page.get_by_label("Select d20").check()
    page.get_by_role("button", name="Compare 2 runs").click()
    page.wait_for_url("**/compare?runs=*")
    expect(page.locator(".legend li")).to_have_count(2)


def test_a_new_run_appears_by_itself(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    page.wait_for_function("() => document.documentElement.dataset.stream === 'open'")
    listed.begin("listrun9", "just started")
    expect(page.locator("tbody tr")).to_have_count(4)


def test_logged_html_is_text(page: Any, server: Any) -> None:
    server.begin("hostilerun", HOSTILE, notes=HOSTILE, tags=["<b>t</b>"], group=HOSTILE)
    server.log("hostilerun", {f"a/{HOSTILE}": {0: 1.0}})
    page.goto(server.url)
    expect(page.locator(".run-name")).to_have_text(HOSTILE)
    assert page.locator("main img, main script, main b").count() == 0


@pytest.mark.parametrize("path", ["/", "/runs/listrun0", "/compare?runs=listrun0,listrun1"])
def test_a_phone_needs_no_sideways_scrolling(
    new_page: Callable[..., Any], listed: Any, path: str
) -> None:
    page = new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    page.goto(listed.url + path)
    page.wait_for_selector("tbody tr, .chart")
    width = page.evaluate("() => document.documentElement.scrollWidth")
    assert width <= 360


def test_dark_follows_the_system_and_the_toggle(new_page: Callable[..., Any], listed: Any) -> None:
    page = new_page(color_scheme="dark")
    page.goto(listed.url)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    assert brightness(dark) < 60
    page.get_by_label("Use light colours").click()
    assert brightness(page.evaluate(ground)) > 200
    page.reload()  # remembered
    assert brightness(page.evaluate(ground)) > 200


def brightness(color: str) -> float:
    numbers = [float(n) for n in re.findall(r"[\d.]+", color)[:3]]
    return sum(numbers) / 3


def test_the_list_is_usable_by_keyboard(page: Any, listed: Any) -> None:
    page.goto(listed.url)
    expect(page.locator("tbody tr")).to_have_count(3)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.get_by_role("link", name="d12").focus()
    page.keyboard.press("Enter")
    page.wait_for_url("**/runs/listrun1")
