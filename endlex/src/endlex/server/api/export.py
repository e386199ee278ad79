"""The route that hands a run out as a file (`endlex.formats`).

Of two points at one step the later one is written. Steps are unique in a metric: those of the
machine's own metrics, seconds since their session began, continue from session to session.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from sqlite3 import Connection
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


@router.get("/runs/{run}/export", dependencies=[Depends(require("read"))])
async def export(
    server: Here,
    run: str,
    format: Format = "csv",
    metric: Annotated[list[str], Query(max_length=500)] = [],  # noqa: B006
) -> Response:
    found = await server.ask(lambda c: show_run(c, run))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", found["name"]).strip("-.")[:80]
    name = f"{safe or 'run'}-{run}.{format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    path = await server.ask(lambda c: _write(c, server.data.partial, run, format, metric))
    gone = BackgroundTask(path.unlink, missing_ok=True)
    return FileResponse(path, 200, headers, MIME[format], background=gone)


def _write(db: Connection, folder: Path, run: str, format: Format, wanted: Sequence[str]) -> Path:
    """Write a run as it is now to a temporary file, so that no slow reader keeps a transaction."""
    handle, name = tempfile.mkstemp(prefix="export-", dir=folder)
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            if format == "html":
                file.write(_render_page(db, run, wanted).encode())
            else:
                pk = find_run(db, run)
                texts, tables = (_iter_records(db, pk, one) for one in ("texts", "tables"))
                series = _iter_series(db, pk, wanted)
                write_run(file, format, show_run(db, run), series, texts, tables)
    except BaseException:
        path.unlink()
        raise
    return path


def _render_page(db: Connection, run: str, wanted: Sequence[str]) -> str:
    """Return the self-contained HTML file, where this installation has the chart library."""
    if lacking := pages.missing_assets():
        message = f"this installation lacks {', '.join(lacking)}: install endlex[server] again"
        raise ApiError(501, message)
    whole, pk = show_run(db, run), find_run(db, run)
    names = [
        metric["name"] for metric in whole["metrics"] if not wanted or metric["name"] in wanted
    ]
    points = pages.points_of_each(len(names))
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
        "alerts": list_alerts(db, run, open_only=True),
        "settings": {"panels": list_settings(db, whole["project"])["panels"]},
    }
    return pages.render(whole["name"], bytes(json_response(data).body).decode())


def _export_points(db: Connection, metric: int) -> Points:
    """Return a metric's points by rising steps; a machine's are seconds since its first point."""
    points = read_all_points(db, metric)
    if not machine_sessions(db, metric):
        return points
    order = np.argsort(points.times, kind="stable")
    times, index = points.times[order], np.arange(len(order))
    seconds = np.rint(times - (points.times - points.steps).min()).astype(np.int64)
    steps = np.maximum.accumulate(seconds - index) + index
    return Points(steps, points.numbers[order], times)


def _iter_series(db: Connection, run: int, wanted: Sequence[str]) -> Iterator[Series]:
    rows = db.execute("SELECT name, pk FROM metric WHERE run=? ORDER BY name", (run,))
    for name, pk in rows.fetchall():
        if not wanted or name in wanted:
            points = _export_points(db, pk)
            yield name, points.steps.tolist(), points.times.tolist(), points.numbers.tolist()


def _iter_records(db: Connection, run: int, kind: Kind) -> Iterator[dict[str, Any]]:
    page = Page(limit=RECORDS_AT_ONCE, own=True)
    while records := list_records(db, kind, run, page):
        for record in records:
            record.pop("id", None)  # it is this database's, and means nothing elsewhere
            yield record
        page = page.model_copy(update={"before_step": records[-1]["step"]})
