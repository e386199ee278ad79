"""The dashboard's pages: shells of HTML, and the scripts and styles that fill them.

A page holds no data and no secret. Its ES modules, served from here without a bundler, ask the API
for everything and put it into the document as text; the content security policy lets nothing else
run. The chart library is put here when the package is built (endlex/server/hatch_build.py);
`missing_assets` names what a build could not get.
"""

from __future__ import annotations

import html
import mimetypes
from collections.abc import Awaitable, Callable
from string import Template

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.staticfiles import StaticFiles

from endlex.search import HELP
from endlex.server.web.export_shell import CHART_ASSETS, STATIC, STYLES, TEMPLATES

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
    links = "\n".join(f'<link rel="stylesheet" href="{root}/static/{name}.css">' for name in STYLES)
    content = template.substitute(
        title=title, script=script, styles=links, root=root, search_help=html.escape(HELP)
    )

    async def page() -> HTMLResponse:
        return HTMLResponse(content)

    return page
