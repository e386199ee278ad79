"""Routes for what people look at: runs, their metadata, charts, texts, tables, alerts, events."""

from __future__ import annotations

import functools
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import numpy as np
import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from sse_starlette.sse import EventSourceResponse

from endlex.protocol import MAX_STEP
from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response, read_json
from endlex.server.errors import ApiError
from endlex.server.events import Hub
from endlex.server.state import server_of
from endlex.server.store.annotations import (
    change_runs,
    check_changes,
    dismiss_alert,
    list_settings,
    save_setting,
)
from endlex.server.store.charts import ChartQuery, read_chart
from endlex.server.store.queries import RunQuery, find_run, list_alerts, list_runs, show_run
from endlex.server.store.texts import Page, list_tables, list_texts

router = APIRouter(prefix="/api/v1")
READ = [Depends(require("read"))]

MOST_METRICS = 500
"""In one request for series."""
PING_SECONDS = 15
SLOW_READER_SECONDS = 10
"""How long one event may take to send before its reader is dropped."""

Step = Annotated[int | None, Query(ge=0, le=MAX_STEP + 1)]
Limit = Annotated[int, Query(ge=1, le=1000)]


@router.get("/runs", dependencies=READ)
async def runs(
    request: Request,
    q: Annotated[str, Query(max_length=1000)] = "",
    project: str | None = None,
    group: str | None = None,
    sort: Annotated[str, Query(max_length=300)] = "-created",
    archived: str | None = None,
    deleted: str | None = None,
    limit: Limit = 100,
    offset: Annotated[int, Query(ge=0, lt=2**62)] = 0,
    column: Annotated[list[str], Query(max_length=200)] = [],  # noqa: B006
    names: bool = False,
    ids: Annotated[str, Query(max_length=40_000)] = "",
) -> Response:
    chosen = tuple(filter(None, ids.split(",")))
    query = RunQuery(
        q, project, group, sort, archived, deleted, limit, offset, tuple(column), names, chosen
    )
    return json_response(await server_of(request).ask(lambda c: list_runs(c, query)))


@router.patch("/runs", dependencies=[Depends(require("annotate", "manage"))])
async def change_many(request: Request) -> Response:
    content = await read_json(request)
    chosen, changes = content.get("runs"), content.get("changes")
    if not isinstance(chosen, list) or not isinstance(changes, dict):
        raise ApiError(422, "give runs, a list of ids, and changes, an object")
    return json_response({"changed": await _change(request, [str(run) for run in chosen], changes)})


@router.get("/runs/{run}", dependencies=[Depends(require("read", "checkpoint"))])
async def run_whole(request: Request, run: str) -> Response:
    return json_response(await server_of(request).ask(lambda c: show_run(c, run)))


@router.patch("/runs/{run}", dependencies=[Depends(require("annotate", "manage"))])
async def change(request: Request, run: str) -> Response:
    await _change(request, [run], await read_json(request))
    return json_response(await server_of(request).ask(lambda c: show_run(c, run)))


async def _change(request: Request, runs: list[str], changes: dict[str, Any]) -> list[str]:
    server = server_of(request)
    columns = check_changes(changes)
    if "deleted" in columns:
        await require("manage")(request)
    statuses = await server.write(lambda connection: change_runs(connection, runs, columns))
    for run, status in statuses.items():
        server.hub.publish("run", {"run": run, "updated": time.time(), "status": status})
    return list(statuses)


Project = Annotated[str, Query(max_length=200)]


@router.get("/settings", dependencies=READ)
async def settings(request: Request, project: Project = "") -> Response:
    return json_response(await server_of(request).ask(lambda c: list_settings(c, project)))


@router.put("/settings", dependencies=[Depends(require("annotate", "manage"))])
async def save(request: Request, kind: str, name: str, project: Project = "") -> Response:
    content = await read_json(request)
    return await _save(request, project, kind, name, content)


@router.delete("/settings", dependencies=[Depends(require("annotate", "manage"))])
async def forget(request: Request, kind: str, name: str, project: Project = "") -> Response:
    return await _save(request, project, kind, name, None)


async def _save(request: Request, project: str, kind: str, name: str, content: Any) -> Response:
    job = functools.partial(save_setting, project=project, kind=kind, name=name, content=content)
    await server_of(request).write(job)
    return json_response({"kind": kind, "name": name})


@router.get("/runs/{run}/series", dependencies=READ)
async def series(
    request: Request,
    run: str,
    metric: Annotated[list[str], Query()],
    x: str = "step",
    first: Annotated[float, Query(alias="from")] = -np.inf,
    last: Annotated[float, Query(alias="to")] = np.inf,
    points: Annotated[int, Query(ge=4, le=100_000)] = 2000,
    log: bool = False,
) -> Response:
    if len(metric) > MOST_METRICS:
        raise ApiError(422, f"{len(metric)} metrics at once; at most {MOST_METRICS}: ask again")
    if np.isnan(first) or np.isnan(last):
        raise ApiError(422, "from and to must be numbers")
    server = server_of(request)
    query = ChartQuery(tuple(dict.fromkeys(metric)), x, first, last, points, log)

    def read() -> tuple[Response, float]:
        began = time.perf_counter()
        with server.database.snapshot() as connection:
            found: dict[str, Any] = read_chart(connection, find_run(connection, run), query)
        answer = json_response({"run": run, "x": x, "series": found})
        return answer, (time.perf_counter() - began) * 1000

    answer, milliseconds = await server.workers.read(read)
    answer.headers["Server-Timing"] = f"series;dur={milliseconds:.3f}"
    return answer


async def page_of(name: str | None = None, before_step: Step = None, limit: Limit = 100) -> Page:
    return Page(name, before_step, limit, own=False)


AskedPage = Annotated[Page, Depends(page_of)]


@router.get("/runs/{run}/texts", dependencies=READ)
async def texts(request: Request, run: str, page: AskedPage) -> Response:
    found = await server_of(request).ask(lambda c: list_texts(c, find_run(c, run), page))
    return json_response({"texts": found})


@router.get("/runs/{run}/tables", dependencies=READ)
async def tables(request: Request, run: str, page: AskedPage) -> Response:
    found = await server_of(request).ask(lambda c: list_tables(c, find_run(c, run), page))
    return json_response({"tables": found})


@router.get("/alerts", dependencies=READ)
async def alerts(
    request: Request,
    run: str | None = None,
    only_open: Annotated[bool, Query(alias="open")] = False,
) -> Response:
    found = await server_of(request).ask(lambda c: list_alerts(c, run, only_open))
    return json_response({"alerts": found})


@router.post("/alerts/{alert}/dismiss", dependencies=[Depends(require("annotate", "manage"))])
async def dismiss(request: Request, alert: int) -> Response:
    server = server_of(request)
    run = await server.write(lambda c: dismiss_alert(c, alert))
    server.hub.publish("alert", {"run": run, "id": alert, "dismissed": True})
    return json_response({"id": alert, "dismissed": True})


@router.get("/events", dependencies=READ)
async def events(request: Request, run: str | None = None) -> Response:
    server = server_of(request)
    if server.hub.full:
        raise ApiError(503, "too many readers of events: close some pages", {"Retry-After": "30"})
    return EventSourceResponse(
        _encoded(server.hub, run), ping=PING_SECONDS, send_timeout=SLOW_READER_SECONDS
    )


async def _encoded(hub: Hub, run: str | None) -> AsyncIterator[dict[str, str]]:
    async for kind, content in hub.read(run):
        yield {"event": kind, "data": orjson.dumps(content).decode()}
