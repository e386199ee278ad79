"""A run as a file: the formats of `endlex.formats`, or one HTML page that needs no network.

Of two points at one step the later one is written. Steps are unique in a metric: those of the
machine's own metrics, seconds since their session began, continue from session to session.

The HTML file has the run's data, the scripts and styles, and the chart library, and its own content
security policy forbids every request. All of it but the run is put into a wheel when that is built
(export_shell.py); a checkout makes it from the sources each time, so that no export is out of date.
"""

from __future__ import annotations

import html
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection
from string import Template
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Depends, Query
from fastapi.responses import FileResponse, Response
from starlette.background import BackgroundTask

from endlex.formats import Series, write_run
from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response
from endlex.server.errors import ApiError
from endlex.server.state import Here
from endlex.server.store.charts import ChartQuery, read_chart
from endlex.server.store.records import Points
from endlex.server.store.runs import find_run, list_alerts, list_settings, show_run
from endlex.server.store.series import machine_sessions, read_all_points
from endlex.server.store.texts import OWN_PREFIX, Kind, Page, list_records
from endlex.server.web import pages
from endlex.server.web.export_shell import TEMPLATES, build_shell

router = APIRouter(prefix="/api/v1")

MOST_RECORDS = 1000
"""Samples, tables, and chunks of each text of Endlex itself in the HTML file: the latest."""
RECORDS_AT_ONCE = 200
MIME = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "parquet": "application/vnd.apache.parquet",
    "html": "text/html; charset=utf-8",
}
Format = Literal["csv", "json", "parquet", "html"]
BUILT_SHELL = TEMPLATES / "export_built.html"
"""The page without its run, which wheels have (hatch_build.py names it)."""
POINTS = 2000
"""Points per series; as many as a chart of the live page gets at first."""
FEWEST_POINTS = 200
MOST_POINTS = 200_000
"""Points of all series together, at about 40 bytes each, in a run of many metrics."""


@router.get("/runs/{run}/export", dependencies=[Depends(require("read"))])
async def export(
    server: Here,
    run: str,
    format: Format = "csv",
    metric: Annotated[list[str], Query(max_length=500)] = [],  # noqa: B006
) -> Response:
    path, title = await server.ask(_write, server.data.partial, run, format, metric)
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", title).strip("-.")[:80]
    name = f"{safe or 'run'}-{run}.{format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    gone = BackgroundTask(path.unlink, missing_ok=True)
    return FileResponse(path, 200, headers, MIME[format], background=gone)


def _write(
    db: Connection, folder: Path, run: str, format: Format, wanted: Sequence[str]
) -> tuple[Path, str]:
    """Write a run as it is now to a temporary file, so that no slow reader keeps a transaction.

    Return the file and the run's name.
    """
    whole, pk = show_run(db, run), find_run(db, run)
    handle, name = tempfile.mkstemp(prefix="export-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if format == "html":
                file.write(_render_page(db, pk, whole, wanted).encode())
            else:
                records = {kind: _iter_records(db, pk, kind) for kind in ("texts", "tables")}
                write_run(file, format, whole, _iter_series(db, pk, wanted), records)
    except BaseException:
        path.unlink()
        raise
    return path, whole["name"]


def _render_page(db: Connection, pk: int, whole: dict[str, Any], wanted: Sequence[str]) -> str:
    """Return the self-contained HTML file, where this installation has the chart library."""
    if lacking := pages.missing_assets():
        message = f"this installation lacks {', '.join(lacking)}: install endlex[server] again"
        raise ApiError(501, message)
    names = [m["name"] for m in whole["metrics"] if not wanted or m["name"] in wanted]
    points = points_of_each(len(names))
    by_step, by_time = (
        read_chart(db, pk, ChartQuery(metric=names, x=x, points=points)) for x in ("step", "time")
    )
    latest = Page(limit=MOST_RECORDS)
    # What a run printed has the highest steps: it must not crowd out the samples.
    own = [Page(limit=MOST_RECORDS, name=n) for n in whole["texts"] if n.startswith(OWN_PREFIX)]
    texts = [text for page in (latest, *own) for text in list_records(db, "texts", pk, page)]
    data = {
        "run": whole,
        "series": {name: {"step": by_step[name], "time": by_time[name]} for name in names},
        "texts": texts,
        "tables": list_records(db, "tables", pk, latest),
        "alerts": list_alerts(db, whole["run"], open_only=True),
        "settings": {"panels": list_settings(db, whole["project"])["panels"]},
    }
    return render(whole["name"], data)


def points_of_each(metrics: int) -> int:
    """Return how many points each series gets in a file with this number of them."""
    return max(FEWEST_POINTS, min(POINTS, MOST_POINTS // max(1, metrics)))


def render(title: str, data: dict[str, Any]) -> str:
    """Return the file's content; `data` has the API's answers, as `local_source.js` gives them."""
    shell = BUILT_SHELL.read_text(encoding="utf-8") if BUILT_SHELL.is_file() else build_shell()
    text = bytes(json_response(data).body).decode().replace("<", r"\u003c")
    return Template(shell).substitute(title=html.escape(title), data=text)


def _iter_series(db: Connection, run: int, wanted: Sequence[str]) -> Iterator[Series]:
    """Yield points by rising steps; a machine's are seconds since its first point."""
    rows = db.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    for name, pk in rows.fetchall():
        if wanted and name not in wanted:
            continue
        points = read_all_points(db, pk)
        if machine_sessions(db, pk):
            start = (points.times - points.steps).min()
            points = points[np.argsort(points.times, kind="stable")]
            index = np.arange(len(points))
            seconds = np.rint(points.times - start).astype(np.int64)
            steps = np.maximum.accumulate(seconds - index) + index
            points = Points(steps, points.numbers, points.times)
        yield name, points.steps.tolist(), points.times.tolist(), points.numbers.tolist()


def _iter_records(db: Connection, run: int, kind: Kind) -> Iterator[dict[str, Any]]:
    page = Page(limit=RECORDS_AT_ONCE, own=True)
    while records := list_records(db, kind, run, page):
        for record in records:
            record.pop("id", None)  # it is this database's, and means nothing elsewhere
            yield record
        page = page.model_copy(update={"before_step": records[-1]["step"]})
