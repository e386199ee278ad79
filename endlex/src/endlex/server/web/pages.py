"""The dashboard's pages: shells of HTML, and the scripts and styles that fill them.

A page holds no data and no secret. Its ES modules, served from here without a bundler, ask the API
for everything and put it into the document as text; the content security policy lets nothing else
run. The chart library is put here when the package is built (endlex/server/hatch_build.py);
`missing_assets` names what a build could not get.
"""

from __future__ import annotations

import hashlib
import html
import mimetypes
from functools import cache
from pathlib import Path
from string import Template

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

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

MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}

PAGE_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
"""`no-cache` asks again each time; the entity tag makes the answer short."""


def build_router(root: str = "") -> APIRouter:
    """Return the routes of the pages and of their static files; `root` is before their paths."""
    router = APIRouter(include_in_schema=False)

    @router.get("/")
    def runs_page() -> Response:
        return _page("Runs · Endlex", "runs_page", root)

    @router.get("/runs/{run}")
    def run_page(run: str) -> Response:
        return _page("Run · Endlex", "run_page", root)  # the script reads the id from the address

    @router.get("/compare")
    def compare_page() -> Response:
        return _page("Compare · Endlex", "compare_page", root)

    @router.get("/login")
    def login_page() -> Response:
        return _page("Log in · Endlex", "login_page", root)

    @router.get("/static/{path:path}")
    def static_file(path: str, request: Request) -> Response:
        return _static(path, request.headers.get("if-none-match", ""))

    return router


def missing_assets() -> list[str]:
    """Return the chart library's files that this installation lacks, for `endlex doctor`."""
    return [name for name in CHART_ASSETS if not (STATIC / name).is_file()]


def _page(title: str, script: str, root: str) -> Response:
    template = Template((TEMPLATES / "page.html").read_text(encoding="utf-8"))
    links = "\n".join(f'<link rel="stylesheet" href="{root}/static/{name}">' for name in STYLES)
    content = template.substitute(
        title=title, script=script, styles=links, root=root, search_help=html.escape(HELP)
    )
    return HTMLResponse(content, headers=dict(PAGE_HEADERS))


def _static(path: str, known_tag: str) -> Response:
    file = STATIC / path
    # Only what the folder's listing has is served, so no path leads out of it.
    if path not in _listing() or not file.is_file():
        return Response(f"there is no file {path!r}", 404, dict(PAGE_HEADERS), "text/plain")
    content = file.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = {**PAGE_HEADERS, "ETag": tag}
    if known_tag == tag:
        return Response(status_code=304, headers=headers)
    kind = MEDIA_TYPES.get(file.suffix) or mimetypes.guess_type(path)[0] or "text/plain"
    return Response(content, 200, headers, kind)


@cache
def _listing() -> frozenset[str]:
    files = (path for path in STATIC.rglob("*") if path.is_file())
    names = (path.relative_to(STATIC).as_posix() for path in files)
    return frozenset(name for name in names if not Path(name).name.startswith("."))
