"""The dashboard's pages: shells of HTML, and the scripts and styles that fill them.

A page holds no data and no secret. Its ES modules, served from here without a bundler, ask the API
for everything and put it into the document as text; the content security policy lets nothing else
run. The chart library is put here when the package is built (endlex/server/hatch_build.py);
`missing_assets` names what a build could not get.

An export is a run as one HTML file: its data, the scripts and styles, and the chart library. It
opens from a disk with no network. A browser loads no module from a file:// address, so each ES
module becomes a function that returns what it exports, and all of them one script, in the order of
their imports. The modules must therefore import by name and without renaming, from each other only,
and export declarations. The file's own content security policy forbids every request.
"""

from __future__ import annotations

import html
import mimetypes
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from string import Template

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from endlex.search import HELP

STATIC = Path(__file__).with_name("static")
TEMPLATES = Path(__file__).with_name("templates")

CHART_ASSETS = ("vendor/uplot/uPlot.iife.min.js", "vendor/uplot/uPlot.min.css")
"""What hatch_build.py fetches, below the static folder."""

STYLES = (
    "colors.css",
    "base.css",
    "controls.css",
    "tables.css",
    "labels.css",
    "run.css",
    "charts.css",
    "phone.css",
)
"""In the order in which they count: later ones win."""

PAGES = {
    "/": ("Runs", "runs_page"),
    "/runs/{run}": ("Run", "run_page"),  # the script reads the id from the address
    "/compare": ("Compare", "compare_page"),
    "/login": ("Log in", "login_page"),
}
"""By path, each page's title and script."""


def install_pages(app: FastAPI, root: str = "") -> None:
    """Add the pages and their static files to the application; `root` is before their paths."""
    mimetypes.add_type("text/javascript", ".js")  # as RFC 9239 has it, and Python from 3.12 on
    app.mount("/static", StaticFiles(directory=STATIC))
    for path, (title, script) in PAGES.items():
        app.add_api_route(path, _page(f"{title} · Endlex", script, root), methods=["GET"])


def missing_assets() -> list[str]:
    """Return the chart library's files that this installation lacks, for `endlex doctor`."""
    return [name for name in CHART_ASSETS if not (STATIC / name).is_file()]


def _page(title: str, script: str, root: str) -> Callable[[], Awaitable[HTMLResponse]]:
    template = Template((TEMPLATES / "page.html").read_text(encoding="utf-8"))
    links = "\n".join(f'<link rel="stylesheet" href="{root}/static/{name}">' for name in STYLES)
    content = template.substitute(
        title=title, script=script, styles=links, root=root, search_help=html.escape(HELP)
    )

    async def page() -> HTMLResponse:
        return HTMLResponse(content)

    return page


ENTRY = "export_page.js"
POINTS = 2000
"""Points per series; as many as a chart of the live page gets at first."""
FEWEST_POINTS = 200
MOST_POINTS = 200_000
"""Points of all series together, at about 40 bytes each, in a run of many metrics."""

_IMPORT = re.compile(r'^import (\{[^}]*\}) from "\./([a-z_]+)\.js";$', re.MULTILINE)
_EXPORT = re.compile(
    r"^export (?P<kind>(?:async )?(?:function|class|const|let)) (?P<name>\w+)", re.MULTILINE
)


def points_of_each(metrics: int) -> int:
    """Return how many points each series gets in a file with this number of them."""
    return max(FEWEST_POINTS, min(POINTS, MOST_POINTS // max(1, metrics)))


def render(title: str, data: str) -> str:
    """Return the file's content.

    Args:
        data: JSON of the answers of `local_source.js` to the page: `run`, `series` (by metric and
            x), `texts`, `tables`, `alerts` and `settings`, each as the API has it.
    """
    template = Template((TEMPLATES / "export.html").read_text(encoding="utf-8"))
    return template.substitute(
        title=html.escape(title),
        styles="\n".join(_static(name) for name in (CHART_ASSETS[1], *STYLES)),
        theme=_escape_script(_static("theme.js")),
        chart_library=_escape_script(_static(CHART_ASSETS[0])),
        data=data.replace("<", r"\u003c"),
        script=_escape_script(bundle(ENTRY)),
    )


def bundle(entry: str) -> str:
    """Return a module and all that it imports as one script, each after what it needs."""
    done: dict[str, str] = {}

    def add(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"modules import each other: {' -> '.join([*above, name])}"
        source = _static(f"js/{name}")
        for _, needed in _IMPORT.findall(source):
            if f"{needed}.js" not in done:
                add(f"{needed}.js", (*above, name))
        exported = ", ".join(found["name"] for found in _EXPORT.finditer(source))
        body = _EXPORT.sub(r"\g<kind> \g<name>", _IMPORT.sub(r"const \1 = module_\2;", source))
        variable = f"module_{name.removesuffix('.js')}"
        done[name] = f"const {variable} = (() => {{\n{body}\nreturn {{ {exported} }};\n}})();"

    add(entry, ())
    return "\n".join(done.values())


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _escape_script(content: str) -> str:
    """Keep our own scripts' strings from ending the element that they stand in."""
    return re.sub(r"<(?=/script|!--|script)", r"\\u003c", content, flags=re.IGNORECASE)
