"""The whole report of runs that only their journals tell of."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import pytest

from archerchat.files import write_json
from archerchat.home import Home
from archerchat.report.document import printable
from archerchat.report.html import render_html
from archerchat.report.markdown import render_markdown
from archerchat.report.spending import Prices
from archerchat.report.training_report import build_training_report, gather

HOSTILE = (
    "</pre><script>alert(1)</script> | `` ```` \x00 [x](javascript:1) <img src=x onerror=y>\ud800"
)
TASK = {"accuracy": 0.5, "centred": 0.25, "random_baseline": 0.25, "examples": 8, "seconds": 7200.0}


class Tags(HTMLParser):
    """Collect the elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def render(home: Home, tag: str | None = None, **prices: Any) -> tuple[str, str, dict[str, str]]:
    document = build_training_report(gather(home, tag), Prices(**prices))
    return render_html(document), *render_markdown(document)


@pytest.fixture
def full_home(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> Home:
    """A model of depth 8 that went through two stages and was evaluated after both."""
    session(home, "d8", range(30), last_bits=0.9381)
    tuned = config(stage="sft", identity={"base": {"tag": "d8"}})
    session(home, "d8-sft", range(10), config=tuned, last_bits=0.4321, text=HOSTILE)
    evals = home.root / "evals"
    tasks = {"copa": TASK, "arc_easy": TASK}
    write_json(evals / "base/d8/core.json", {"core": 0.1234, "tasks": tasks, "step": 30})
    chat = {"chatcore": 0.2345, "sampling": {}, "tasks": {"MMLU": TASK}, "step": 10}
    write_json(evals / "sft/d8/chat.json", chat)
    offline = {"core": 0.7, "tasks": {"offline_copy": TASK}, "step": 30}
    write_json(evals / "base/d8/offline.json", offline)
    return home


def test_it_has_what_is_asked_of_it(full_home: Home) -> None:
    page, text, _ = render(full_home, "d8")
    for form in (page, re.sub(r"\\(.)", r"\1", text)):
        for expected in (
            "0.9381",
            "0.4321",
            "0.1234",
            "0.2345",
            "0.256525",  # GPT-2
            "0.0976",  # the reference's CORE at this depth
            "0.4185",
            "c0ffee",
            "archerchat pretrain --depth 8",
            "RTX 5060 Ti",
            "They are not CORE",
            "of France is",
        ):
            assert expected in form, expected


def test_every_kind_of_chart_is_there(full_home: Home) -> None:
    page, text, files = render(full_home, "d8")
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", page)
    for expected in ("Training loss", "Learning rate", "Tokens per second", "Model FLOPs"):
        assert sum(title.startswith(expected) for title in titles) == 2, expected
    assert len(titles) == len(files) == text.count("](charts/")
    assert all(f"]({name})" in text for name in files)


def test_the_page_needs_nothing_else(full_home: Home) -> None:
    """No script, no request, whatever the runs say."""
    page, _, files = render(full_home, "d8")
    tags = Tags()
    tags.feed(page)
    assert not {"script", "img", "link", "iframe"} & set(tags.names)
    assert not {name for name in tags.attributes if name.startswith("on") or name == "src"}
    assert "default-src 'none'" in page
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    page.encode()  # a lone surrogate would not pass
    assert all(ord(c) >= 32 or c == "\n" for c in page)
    assert not any("<script" in content for content in files.values())


def test_markdown_cannot_be_broken_out_of(full_home: Home) -> None:
    _, text, _ = render(full_home, "d8")
    fence = next(line for line in text.splitlines() if line.startswith("`````"))
    body = text.split(fence + "\n", 1)[1] if fence.endswith("text") else text
    assert "alert(1)" in body.split("`````")[0]
    outside = re.sub(r"(`{3,})text\n.*?\n\1", "", text, flags=re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside


def test_time_and_cost(full_home: Home) -> None:
    page, _, _ = render(full_home, "d8", per_hour=3.0)
    assert "4 h 00 min" in page  # CORE: two tasks of two hours
    assert "$12.00" in page
    assert "at $3.00 an hour" in page
    page, _, _ = render(full_home, "d8", per_kwh=0.5)
    assert "180 W at $0.50 a kWh" in page
    assert f"${4 * 0.18 * 0.5:.2f}" in page


def test_a_run_that_is_not_over_says_so(home: Home, session: Callable[..., None]) -> None:
    session(home, "d8", range(3), status="interrupted")
    page, _, _ = render(home)
    assert "is interrupted" in page
    assert "CORE has not been measured" in page


def test_a_depth_without_reference(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    session(home, "odd", range(3), config=config(model_config={"num_layers": 9}))
    page, _, _ = render(home)
    assert "depths 8, 12, 24, not for 9" in page
    assert "reference d" not in page


def test_little_is_enough(home: Home, session: Callable[..., None]) -> None:
    """A journal of a run that logged nothing of ours."""
    session(home, "bare", [], config={"some": "thing"})
    page, text, _ = render(home)
    assert "bare" in page
    assert "not recorded" in text


def test_texts_are_made_printable() -> None:
    assert printable("a\x00b\x7f\r\nc\td\x85\ud800") == "a␀b␡\nc\td\ufffd\ufffd"
