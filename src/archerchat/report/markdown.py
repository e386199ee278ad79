"""Write a document as Markdown, its charts as SVG files beside it.

What comes from a run cannot become markup: in text every character that Markdown or HTML could
take for theirs is escaped, and passages stand in fences longer than any of their own.
"""

from __future__ import annotations

import re

from archerchat.report import charts
from archerchat.report.document import (
    Charts,
    Details,
    Document,
    Facts,
    Paragraph,
    Part,
    Sample,
    Table,
    printable,
)

FOLDER = "charts"
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>|#~$&!])")


def render_markdown(document: Document) -> tuple[str, dict[str, str]]:
    """Return the text, and the content of each file that it shows, by its path beside it."""
    files: dict[str, str] = {}
    blocks = [f"# {_text(document.title)}", _text(document.subtitle)]
    for section in document.sections:
        blocks.append(f"## {_text(section.title)}")
        blocks += [_part(part, files) for part in section.parts]
    return "\n\n".join(block for block in blocks if block) + "\n", files


def _part(part: Part, files: dict[str, str]) -> str:
    match part:
        case Paragraph():
            return ("> " if part.notice else "") + _text(part.text)
        case Facts():
            return "\n".join(
                f"- {_text(f.label)}: **{_text(f.value)}**" + (f" ({_text(f.note)})" * bool(f.note))
                for f in part.facts
            )
        case Table():
            rule = ["---", *(["---:" if part.figures else "---"] * (len(part.columns) - 1))]
            rows = [[_text(cell) for cell in row] for row in (part.columns, *part.rows)]
            lines = [rows[0], rule, *rows[1:]]
            return "\n".join(f"| {' | '.join(line)} |" for line in lines)
        case Charts():
            return "\n\n".join(_chart(chart, files) for chart in part.charts)
        case Sample() | Details():
            return f"**{_text(part.title)}**\n\n{_fenced(part.text)}"


def _chart(chart: charts.Chart, files: dict[str, str]) -> str:
    name = f"{FOLDER}/{len(files) + 1:02d}-{_slug(chart.title)}.svg"
    files[name] = charts.standalone(chart)
    return f"**{_text(chart.title)}**\n\n![{_text(chart.title)}]({name})"


def _slug(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:60] or "chart"


def _fenced(text: str) -> str:
    text = printable(text)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def _text(text: str) -> str:
    """Escape text and put it on one line."""
    return _SPECIAL.sub(r"\\\1", " ".join(printable(text).split()))
