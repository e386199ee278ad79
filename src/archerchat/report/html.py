"""Write a document as one HTML page that needs nothing else: no script, no network, light and dark.

Everything that comes from a run is escaped, and the page's own policy forbids scripts and requests.
"""

from __future__ import annotations

import re
from html import escape

from archerchat.report import charts
from archerchat.report.document import (
    Charts,
    Details,
    Document,
    Facts,
    Paragraph,
    Part,
    Sample,
    Section,
    Table,
    printable,
)

POLICY = "default-src 'none'; style-src 'unsafe-inline'"
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--text);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:32px 20px 64px}
h1{font-size:1.9rem;line-height:1.2;margin:0;overflow-wrap:anywhere}
h2{font-size:1.2rem;margin:44px 0 14px}
p{margin:0 0 14px;max-width:76ch}
.subtitle,.note{color:var(--muted)}
nav{margin:14px 0 0;display:flex;flex-wrap:wrap;gap:4px 18px}
a{color:var(--c0);text-underline-offset:3px}
.notice{border-left:3px solid var(--c1);background:var(--card);padding:10px 14px;border-radius:4px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(150px,1fr));gap:12px;
margin:0 0 18px}
.facts>div,figure,.sample{background:var(--card);border:1px solid var(--line);border-radius:10px}
.facts>div{padding:12px 14px;min-width:0}
.facts dt{color:var(--muted);font-size:.85rem}
.facts dd{margin:0;font-size:1.3rem;font-weight:600;overflow-wrap:anywhere;
font-variant-numeric:tabular-nums}
.facts .note{font-size:.82rem;font-weight:400}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,330px),1fr));gap:14px;
margin:0 0 18px}
figure{margin:0;padding:12px 14px 10px;min-width:0;max-width:560px}
figcaption{font-weight:600;margin-bottom:6px}
.scroll{overflow-x:auto;margin:0 0 18px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:6px 12px;border-bottom:1px solid var(--line);text-align:left;vertical-align:top}
th{color:var(--muted);font-weight:600;font-size:.87rem;white-space:nowrap}
th:first-child,td:first-child{padding-left:2px;min-width:9em}
table.figures th:not(:first-child),table.figures td:not(:first-child){text-align:right}
table.figures td:not(:first-child){white-space:nowrap}
table:not(.figures) td{overflow-wrap:anywhere;min-width:9em}
.sample{padding:10px 14px;margin:0 0 12px}
.sample b{display:block;color:var(--muted);font-weight:600;font-size:.85rem}
pre{margin:4px 0 0;white-space:pre-wrap;overflow-wrap:anywhere;
font:13px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace}
details{margin:0 0 12px}
summary{cursor:pointer;font-weight:600}
@media print{nav{display:none}section{break-inside:avoid-page}}
"""


def render_html(document: Document) -> str:
    """Return the page."""
    anchors = [_anchor(section.title) for section in document.sections]
    links = "".join(
        f'<a href="#{anchor}">{_text(section.title)}</a>'
        for anchor, section in zip(anchors, document.sections, strict=True)
    )
    body = "".join(
        _section(section, anchor)
        for anchor, section in zip(anchors, document.sections, strict=True)
    )
    title = _text(document.title)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{charts.COLORS}{STYLE}{charts.STYLE}</style></head>\n"
        f'<body><main><header><h1>{title}</h1><p class="subtitle">{_text(document.subtitle)}</p>'
        f"<nav>{links}</nav></header>\n{body}</main></body></html>\n"
    )


def _section(section: Section, anchor: str) -> str:
    parts = "\n".join(_part(part) for part in section.parts)
    return f'<section id="{anchor}"><h2>{_text(section.title)}</h2>\n{parts}</section>\n'


def _part(part: Part) -> str:
    match part:
        case Paragraph():
            mark = ' class="notice"' if part.notice else ""
            return f"<p{mark}>{_text(part.text)}</p>"
        case Facts():
            facts = (
                f"<div><dt>{_text(f.label)}</dt><dd>{_text(f.value)}"
                + (f'<div class="note">{_text(f.note)}</div>' if f.note else "")
                + "</dd></div>"
                for f in part.facts
            )
            return f'<dl class="facts">{"".join(facts)}</dl>'
        case Table():
            return _table(part)
        case Charts():
            figures = (
                f"<figure><figcaption>{_text(chart.title)}</figcaption>{charts.draw(chart)}"
                "</figure>"
                for chart in part.charts
            )
            return f'<div class="charts">{"".join(figures)}</div>'
        case Sample():
            return (
                f'<div class="sample"><b>{_text(part.title)}</b><pre>{_text(part.text)}</pre></div>'
            )
        case Details():
            return (
                f"<details><summary>{_text(part.title)}</summary><pre>{_text(part.text)}</pre>"
                "</details>"
            )


def _table(table: Table) -> str:
    head = "".join(f"<th>{_text(name)}</th>" for name in table.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in table.rows
    )
    kind = ' class="figures"' if table.figures else ""
    return (
        f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _anchor(title: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"


def _text(text: str) -> str:
    return escape(printable(text))
