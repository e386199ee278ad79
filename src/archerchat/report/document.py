"""Render a report as Markdown from a template, with its charts, and convert it to an HTML page.

Text from a run cannot become markup: its special characters are escaped in Markdown, and passages
are in fences longer than any fence in them. The page needs no script and no network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape, unescape
from pathlib import Path
from string import Template
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markdown_it import MarkdownIt

from archerchat import __version__
from archerchat.console import bytes_text, duration_text
from archerchat.files import new_directory
from archerchat.report.charts import Bars, Lines, compact, draw

ABSENT = "–"
HTML, MARKDOWN, CHARTS = "report.html", "report.md", "charts"
"""Files and folder in a report's directory."""
FOLDER = Path(__file__).parent


class Markup(str):
    """Markdown. A template escapes every other value that it shows."""


def build_environment(folder: Path) -> Environment:
    """Build what renders the templates of a folder, with filters that write figures."""
    environment = Environment(
        loader=FileSystemLoader(folder),
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "bytes": bytes_text,
        "compact": compact,
        "dollars": lambda v: ABSENT if v is None else f"${v:,.{2 if v >= 0.1 else 3}f}",
        "duration": duration_text,
        "file_name": lambda v: Path(v).name,
        "moment": lambda v: datetime.fromtimestamp(v, UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "percent": lambda v, digits=1: f"{v:z.{digits}%}",
        "score": lambda v: ABSENT if v is None else f"{v:z.4f}",
    }
    return environment


class Document:
    """A report: Markdown from a template in this folder, and its charts."""

    def __init__(self, template: str, **values: Any) -> None:
        self.charts: dict[str, str] = {}
        """SVG by its path relative to the Markdown file."""
        environment = build_environment(FOLDER)
        environment.finalize = lambda v: v if isinstance(v, Markup) else escaped(str(v))
        environment.globals |= {"draw": self._draw, "passage": _passage}
        text = environment.get_template(template).render(version=__version__, **values)
        self.markdown = re.sub(r"\n{3,}(?=[^\n`])", "\n\n", text)

    def _draw(self, charts: Sequence[Lines | Bars]) -> Markup:
        """Draw charts side by side."""
        images = []
        for chart in charts:
            name = f"{CHARTS}/{len(self.charts) + 1:02d}-{_anchor(chart.title)[:60]}.svg"
            self.charts[name] = draw(chart)
            images.append(f"![{escaped(chart.title)}]({name})")
        return Markup("\n".join(images))

    @property
    def html(self) -> str:
        """The HTML page, including its charts."""
        body = MarkdownIt("commonmark", {"html": False}).enable("table").render(self.markdown)
        # Only the renderer writes the tags that follow: text of a run has its own escaped.
        titles = re.findall(r"<h2>(.*?)</h2>", body)
        for pattern, replacement in (
            (r"<h2>(.*?)</h2>", lambda m: f'<h2 id="{_anchor(unescape(m[1]))}">{m[1]}</h2>'),
            (r"<p>((?:<img [^>]*>\s*)+)</p>", r'<div class="charts">\1</div>'),
            (r'<img src="([^"]*)"[^>]*>', lambda m: self.charts[m[1]]),
            (r"<table>.*?</table>", r'<div class="scroll">\g<0></div>'),
            (
                r'<pre><code class="language-json">.*?</pre>',
                r"<details><summary>Show</summary>\g<0></details>",
            ),
        ):
            body = re.sub(pattern, replacement, body, flags=re.DOTALL)
        links = (f'<a href="#{_anchor(unescape(title))}">{title}</a>' for title in titles)
        body = body.replace("</p>", f"</p>\n<nav>{' '.join(links)}</nav>", 1)  # under the title
        title = escape(printable(unescape(re.findall(r"<h1>(.*?)</h1>", body)[0])))
        page = Template((FOLDER / "page.html").read_text(encoding="utf-8"))
        return page.substitute(title=title, body=body)

    def write(self, directory: Path) -> tuple[Path, Path]:
        """Replace `directory` by the report; return the page and the Markdown."""
        with new_directory(directory) as new:
            (new / CHARTS).mkdir()
            for name, text in {HTML: self.html, MARKDOWN: self.markdown, **self.charts}.items():
                (new / name).write_text(text, encoding="utf-8")
        return directory / HTML, directory / MARKDOWN


def _passage(title: str, text: str, language: str = "text") -> Markup:
    """Render a text verbatim; the page folds JSON."""
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"**{escaped(title)}**\n\n{fence}{language}\n{text}\n{fence}")


def _anchor(title: str) -> str:
    """Return a heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w -]", "", title.lower(), flags=re.ASCII).replace(" ", "-")


def escaped(text: str) -> str:
    """Escape text for Markdown and put it on one line."""
    return re.sub(r"([\\`*_{}\[\]<>|#~$&!])", r"\\\1", " ".join(printable(text).split()))


def printable(text: str) -> str:
    """Return text with pictures for control characters, and U+FFFD for lone surrogates."""
    pictures = {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"} | {127: 0x2421}
    text = text.replace("\r\n", "\n").translate(pictures)
    return re.sub(r"[\ud800-\udfff\x80-\x9f]", "\ufffd", text)
