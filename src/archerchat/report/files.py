"""Write a report where it is looked for: one HTML page, and Markdown with its charts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from archerchat.files import new_directory
from archerchat.home import Home, check_name
from archerchat.report.document import Document
from archerchat.report.html import render_html
from archerchat.report.markdown import render_markdown


@dataclass(frozen=True)
class ReportFiles:
    html: Path
    markdown: Path


def default_directory(home: Home, name: str) -> Path:
    """Return where a report of this name is kept."""
    return home.root / "reports" / check_name(name, "report name")


def write_report(document: Document, directory: Path) -> ReportFiles:
    """Put both forms of a document into `directory`, in place of what an earlier report left."""
    text, files = render_markdown(document)
    with new_directory(directory) as new:
        (new / "report.html").write_text(render_html(document), encoding="utf-8")
        (new / "report.md").write_text(text, encoding="utf-8")
        for name, content in files.items():
            path = new / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(content, encoding="utf-8")
    return ReportFiles(directory / "report.html", directory / "report.md")
