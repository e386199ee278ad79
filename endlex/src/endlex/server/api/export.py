"""The route that hands a run out as a file."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import FileResponse, Response, StreamingResponse
from starlette.background import BackgroundTask

from endlex.server.api.auth import require
from endlex.server.errors import ApiError
from endlex.server.state import Server, server_of
from endlex.server.store.annotations import list_settings
from endlex.server.store.charts import ChartQuery, read_chart
from endlex.server.store.database import connect
from endlex.server.store.export import FORMATS, iter_csv, iter_json, temporary_file, write_parquet
from endlex.server.store.queries import find_run, list_alerts, show_run
from endlex.server.store.texts import Page, list_tables, list_texts
from endlex.server.web import html_export, pages

router = APIRouter(prefix="/api/v1")

MOST_RECORDS = 1000
"""Texts, and tables, in the HTML file: the latest."""


@router.get("/runs/{run}/export", dependencies=[Depends(require("read"))])
async def export(
    request: Request,
    run: str,
    format: Literal["csv", "json", "parquet", "html"] = "csv",
    metric: Annotated[list[str], Query(max_length=500)] = [],  # noqa: B006
) -> Response:
    server = server_of(request)
    found = await server.workers.read(lambda: show_run(server.database.reader(), run))
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", found["name"]).strip("-.")[:80]
    name = f"{safe or 'run'}-{run}.{format}"
    headers = {"Content-Disposition": f'attachment; filename="{name}"'}
    if format == "parquet":
        path = await server.workers.read(_parquet, server, run, metric)
        gone = BackgroundTask(path.unlink, missing_ok=True)
        return FileResponse(path, 200, headers, FORMATS[format], background=gone)
    if format == "html":
        page = await server.workers.read(_page, server, run, found)
        return Response(page, 200, headers, FORMATS[format])
    pieces = _stream(
        server, run, partial(iter_csv, wanted=metric) if format == "csv" else iter_json
    )
    return StreamingResponse(pieces, 200, headers, FORMATS[format])


def _parquet(server: Server, run: str, wanted: Sequence[str]) -> Path:
    path = temporary_file(server.data.partial)
    try:
        with server.database.snapshot() as connection:
            write_parquet(connection, run, path, wanted)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return path


async def _stream(
    server: Server, run: str, iterate: Callable[[sqlite3.Connection, str], Iterator[bytes]]
) -> AsyncIterator[bytes]:
    """Yield what `iterate` does, made in a thread.

    There is no transaction around it: a reader who takes an hour must not keep the database's log
    from being emptied for so long.
    """
    connection = await server.workers.read(connect, server.data.database, read_only=True)
    try:
        pieces = iterate(connection, run)
        while (piece := await server.workers.read(next, pieces, None)) is not None:
            yield piece
    finally:
        connection.close()


def _page(server: Server, run: str, found: dict[str, Any]) -> str:
    """Return the self-contained HTML file, where this installation has the chart library."""
    if lacking := pages.missing_assets():
        message = f"this installation lacks {', '.join(lacking)}: install endlex[server] anew"
        raise ApiError(501, message)
    with server.database.snapshot() as connection:
        pk, latest = find_run(connection, run), Page(limit=MOST_RECORDS)

        def read_series(
            metrics: Sequence[str], x: str, points: int
        ) -> Mapping[str, Mapping[str, Any]]:
            return read_chart(connection, pk, ChartQuery(tuple(metrics), x, points=points))

        return html_export.render(
            found,
            read_series,
            list_texts(connection, pk, latest),
            list_tables(connection, pk, latest),
            list_alerts(connection, run, open_only=True),
            {"panels": list_settings(connection, found["project"])["panels"]},
        )
