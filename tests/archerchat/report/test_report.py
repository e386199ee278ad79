"""The whole report of runs that only their journals tell of."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import escape
from html.parser import HTMLParser
from typing import Any

import pytest

import endlex
from archerchat.files import write_json
from archerchat.home import Home
from archerchat.planning.gpus import Prices
from archerchat.report.charts import Bars, Lines
from archerchat.report.comparison import compare, read_course
from archerchat.report.document import Document, printable
from archerchat.report.report import build_training_report, result_chart, run_charts
from archerchat.report.runs import gather, load_results, load_run

HOSTILE = (
    "</pre><script>alert(1)</script> | `` ```` \x00 [x](javascript:1) <img src=x onerror=y>\ud800"
)
TASK = {
    "label": "copa",
    "task_type": "multiple_choice",
    "random_baseline": 0.25,
    "examples": 8,
    "correct": 4,
    "seconds": 14400.0 / 22,
}
MMLU = {
    "kind": "categorical",
    "problems": 8,
    "accuracy": 0.5,
    "random_baseline": 0.25,
    "seconds": 7200,
}
WHOLE = {"max_per_task": None, "max_length": None}
GREEDY = {"temperature": 0.0, "num_samples": 1, "max_new_tokens": 512}


@pytest.fixture(autouse=True)
def sketches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no charts, which takes most of the time, but their names."""

    def sketch(chart: Lines | Bars) -> str:
        return f'<svg class="chart" aria-label="{escape(chart.title)}"></svg>'

    monkeypatch.setattr("archerchat.report.document.draw", sketch)


class Tags(HTMLParser):
    """Collect the elements of a page, with their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [name for name, _ in attrs]


def render(home: Home, tag: str | None = None, **prices: Any) -> Document:
    return build_training_report(*gather(home, tag), Prices(**prices))


@pytest.fixture
def full_home(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> Home:
    """A model of depth 8 that went through two stages and was evaluated after both."""
    session(home, "d8", range(30), last_bits=0.9381)
    tuned = config(stage="sft", identity={"base": {"tag": "d8"}})
    session(home, "d8-sft", range(10), config=tuned, last_bits=0.4321, text=HOSTILE)
    base, sft = home.eval_dir("base", "d8"), home.eval_dir("sft", "d8")
    whole = {"core": 0.1234, "tasks": [TASK] * 22, "step": 30, "options": WHOLE}
    write_json(base / "core_30.json", whole)
    capped = whole | {"core": 0.9, "options": WHOLE | {"max_per_task": 4}}
    capped |= {"tasks": [TASK | {"examples": 4}] * 22}
    write_json(base / "core_30_max4.json", capped)
    chat = {"sampling": GREEDY, "limits": {"MMLU": None}, "step": 10, "complete": True}
    write_json(sft / "chat_10.json", chat | {"chatcore": 0.2345, "tasks": {"MMLU": MMLU}})
    offline = TASK | {"label": "offline_copy", "seconds": 7200.0}
    write_json(base / "offline_30.json", whole | {"core": 0.7, "tasks": [offline]})
    return home


def test_it_has_what_is_asked_of_it(full_home: Home) -> None:
    document = render(full_home, "d8")
    for form in (document.html, re.sub(r"\\(.)", r"\1", document.markdown)):
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


def test_every_chart_is_in_the_page_and_beside_the_markdown(full_home: Home) -> None:
    document = render(full_home, "d8")
    titles = re.findall(r'<svg class="chart"[^>]* aria-label="(.*?)"', document.html)
    for expected in ("Loss", "Learning rate", "Throughput"):
        assert sum(title.startswith(expected) for title in titles) == 2, expected
    assert len(titles) == len(document.charts) == document.markdown.count("](charts/")
    assert all(f"]({name})" in document.markdown for name in document.charts)
    assert document.html.count('<div class="charts">') == 5  # of two runs, three evaluations


def test_training_and_validation_share_a_chart(home: Home, session: Callable[..., None]) -> None:
    session(home, "d8", range(3))
    loss, throughput, *_ = run_charts(load_run(home, "d8"))
    assert [series.label for series in loss.series] == ["", "training", "validation"]
    assert (loss.y_label, loss.right_label) == ("nats per token", "bits per byte")
    assert throughput.right_label == "MFU in %"
    assert throughput.right_scale == pytest.approx(100 * 0.4 / 256)


def test_the_loss_of_a_policy_has_no_unit(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    session(home, "d8-rl", range(3), config=config(stage="rl"))
    loss = run_charts(load_run(home, "d8-rl"))[0]
    assert (loss.title, loss.y_label, loss.right_label) == ("Policy loss", "", "")


def test_bars_have_intervals(full_home: Home) -> None:
    core = load_results(full_home, "base", "d8")[-1]
    for _, value, (low, high), shown in result_chart(core).bars:
        assert low < value < high
        assert shown == "50.0%"


def test_a_capped_core_is_not_set_against_gpt2(full_home: Home) -> None:
    (full_home.eval_dir("base", "d8") / "core_30.json").unlink()
    text = render(full_home, "d8").markdown
    assert "| CORE | 0.9000 (at most 4 per task) | – | 0.0976 |\n" in text
    assert "This is not the whole evaluation: at most 4 per task." in text
    assert "of GPT-2 XL's" not in text


def test_gpt2_has_a_column_where_it_has_a_figure(full_home: Home) -> None:
    rows = re.findall(r"^\|.*\|$", render(full_home, "d8").markdown, re.M)
    assert rows[0] == "|  | base | sft | reference d8 | GPT-2 XL |"
    assert "| CORE | 0.1234 | – | 0.0976 | 0.256525 |" in rows
    for file in full_home.eval_dir("base", "d8").glob("core_*.json"):
        file.unlink()
    rows = re.findall(r"^\|.*\|$", render(full_home, "d8").markdown, re.M)
    assert rows[0] == "|  | base | sft | reference d8 |"


def test_a_model_stands_between_gpt2_and_gpt3(full_home: Home) -> None:
    """On the ladder of SPEC section 11, which says what is measured and what is estimated."""
    text = render(full_home, "d8").markdown.replace("**", "")
    rungs = re.findall(r"^\| (.*) \| 0\.(\d{4}) \| (measured|estimated|this model) \|$", text, re.M)
    assert [core for _, core, _ in rungs] == sorted(core for _, core, _ in rungs)
    at = rungs.index(("d8", "1234", "this model"))
    assert rungs[at - 1] == ("GPT-2 124M", "1139", "measured")
    assert rungs[at + 1] == ("GPT-3 125M", "1480", "estimated")
    assert len(rungs) == 13
    (full_home.eval_dir("base", "d8") / "core_30.json").unlink()  # a capped one is left
    assert "Where it stands" not in render(full_home, "d8").markdown


def test_the_page_needs_nothing_else(full_home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """No script, no request, whatever the runs say."""
    monkeypatch.undo()  # real charts
    document = render(full_home, "d8")
    tags = Tags()
    tags.feed(document.html)
    assert not {"script", "img", "link", "iframe"} & set(tags.names)
    assert not {name for name in tags.attributes if name.startswith("on") or name == "src"}
    assert "default-src 'none'" in document.html
    assert not re.search(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", document.html)
    document.html.encode()  # a lone surrogate would not pass
    assert all(ord(c) >= 32 or c == "\n" for c in document.html)
    assert not any("<script" in content for content in document.charts.values())


def test_markdown_cannot_be_broken_out_of(full_home: Home) -> None:
    text = render(full_home, "d8").markdown
    fence = next(line for line in text.splitlines() if line.startswith("`````"))
    body = text.split(fence + "\n", 1)[1]
    assert "alert(1)" in body.split("`````")[0]
    outside = re.sub(r"(`{3,})(text|json)\n.*?\n\1", "", text, flags=re.DOTALL)
    assert "<script" not in outside
    assert "<img" not in outside


def test_names_cannot_become_markup(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    name = "<b>|*x*|[y](z) `c` # &amp;"
    session(home, "d8", range(2), config=config(config={"data": name}))
    document = render(home)
    assert "data: &lt;b&gt;|*x*|[y](z) `c` # &amp;amp;." in document.html


def test_a_page_is_the_same_each_time(full_home: Home) -> None:
    assert render(full_home, "d8").html == render(full_home, "d8").html


def test_headings_have_the_anchors_that_the_links_name(full_home: Home) -> None:
    page = render(full_home, "d8").html
    links = re.findall(r'<a href="#(.*?)">', page)
    assert links == re.findall(r'<h2 id="(.*?)">', page)
    assert "core-task-by-task-base" in links


def test_time_and_cost(full_home: Home) -> None:
    page = render(full_home, "d8", price_per_hour=3.0).html
    assert "4.0 h" in page  # CORE: 22 tasks
    assert "$12.00" in page
    assert "$3.00 per hour" in page
    page = render(full_home, "d8", price_per_kwh=0.5).html
    assert "180 W at $0.50 per kWh" in page
    assert f"${4 * 0.18 * 0.5:.2f}" in page
    rows = re.findall(r"\| (.*?) \| .*? \| (.*?) \|\n", render(full_home).markdown)
    assert len([name for name, cost in rows if "\\$" in cost]) == 7


def test_the_time_of_all_stages_is_added_up(home: Home, session: Callable[..., None]) -> None:
    session(home, "d8", range(60))
    text = render(home, price_per_hour=3600.0).markdown
    # 60 steps of 2 seconds, an evaluation of 3; the session's own clock ran less.
    assert "| d8 | 2 min | 3 s | 0 s | 2 min | \\$123.00 |" in text
    assert "| Sum | 2 min | 3 s | 0 s | 2 min | \\$123.00 |" in text


def test_a_mixture_is_named_as_it_was_typed(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    data = {"mixture": "identity*2,Arithmetic:600", "jsonl": [], "mixture_seed": 42}
    session(home, "d8-sft", range(2), config=config(stage="sft", config={"data": data}))
    assert "data: identity*2,Arithmetic:600." in render(home).html


def test_a_run_that_is_not_over_says_so(home: Home, session: Callable[..., None]) -> None:
    session(home, "d8", range(3), status="interrupted")
    page = render(home).html
    assert "<blockquote>\n<p>Run d8 is interrupted" in page
    assert "CORE has not been measured" in page


def test_a_depth_without_reference(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    session(
        home,
        "d9",
        range(3),
        config=config(model_config=config()["model_config"] | {"num_layers": 9}),
    )
    page = render(home).html
    assert "depths 8, 12, 24, not 9" in page
    assert "reference d" not in page


def test_a_shape_that_cannot_be_built_breaks_no_report(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    whole = config()["model_config"]
    shapes = [{"num_layers": 9}, whole | {"num_heads": 0}, whole | {"of_later": 1}, [1], "x"]
    for number, shape in enumerate(shapes):
        session(home, f"odd{number}", range(3), config=config(model_config=shape))
    session(home, "d8", range(3))
    assert "depth 8" in render(home, "d8").markdown
    assert "report: d9" in render(home, "odd0").markdown
    for number in range(len(shapes)):
        assert f"odd{number}" in render(home, f"odd{number}").markdown
        assert compare(read_course(home, "d8"), read_course(home, f"odd{number}"))


def test_the_reference_is_described_only_beside_its_figures(
    home: Home, session: Callable[..., None], config: Callable[..., dict[str, Any]]
) -> None:
    run = endlex.init("archerchat", "d8", config(), directory=home.run_dir("d8"), mode="offline")
    run.log({"train/loss": 3.0, "train/tokens": 512}, step=0)
    run.finish()
    text = render(home).markdown
    assert "reference d8" not in text
    assert "The reference" not in text
    session(home, "d8", range(1, 3))
    text = render(home).markdown
    assert "reference d8" in text
    assert "The reference's d8: " in text


def test_little_is_enough(home: Home, session: Callable[..., None]) -> None:
    """A journal of a run that logged nothing of ours."""
    session(home, "bare", [], config={"some": "thing"})
    document = render(home)
    assert "bare" in document.html
    assert "not recorded" in document.markdown


def test_texts_are_made_printable() -> None:
    assert printable("a\x00b\x7f\r\nc\td\x85\ud800") == "a␀b␡\nc\td\ufffd\ufffd"


def test_it_says_how_often_the_text_was_seen_and_that_it_was_learned_by_heart(
    home: Home, session: Callable[..., None]
) -> None:
    session(home, "d8", range(3), last_bits=0.8, status="interrupted")
    session(home, "d8", range(3, 5), last_bits=0.9)
    runs, results = gather(home, "d8")
    runs[0].metrics |= {"data/epochs": {4: 12.34}, "data/text_share": {4: 0.029}}
    text = build_training_report(runs, results, Prices()).markdown
    assert "data: tiny, 12.34 passes, 2.9% of the text in rows." in text
    assert "> The text repeats" in text
    assert "> Validation got worse while the training loss fell" in text
    runs[0].metrics |= {"data/epochs": {4: 0.5}, "val/bpb": {3: 0.8, 5: 0.801}}
    text = build_training_report(runs, results, Prices()).markdown
    assert "text repeats" not in text
    assert "got worse" not in text
