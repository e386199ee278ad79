"""Routes for what people look at: runs, their metadata, charts, texts, tables, alerts, events."""

from __future__ import annotations

import time
from sqlite3 import Connection
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response
from pydantic import BaseModel
from sse_starlette.sse import EventSourceResponse

from endlex.server.api.auth import require
from endlex.server.api.bodies import json_response, read_json
from endlex.server.errors import ApiError
from endlex.server.events import MOST_READERS
from endlex.server.state import Here, Server
from endlex.server.store import runs
from endlex.server.store.charts import ChartQuery, read_chart
from endlex.server.store.runs import Changes, RunQuery, find_run
from endlex.server.store.texts import KINDS, Kind, Page, list_records

router = APIRouter(prefix="/api/v1")
READ = [Depends(require("read"))]
ANNOTATE = [Depends(require("annotate", "manage"))]

PING_SECONDS = 15
SLOW_READER_SECONDS = 10
"""How long one event may take to send before its reader is dropped."""

Project = Annotated[str, Query(max_length=200)]


class BulkChange(BaseModel):
    """The same changes to many runs."""

    runs: list[str]
    changes: Changes


@router.get("/runs", dependencies=READ)
async def list_runs(server: Here, query: Annotated[RunQuery, Query()]) -> Response:
    return json_response(await server.ask(runs.list_runs, query))


@router.patch("/runs", dependencies=ANNOTATE)
async def change_many(request: Request, server: Here) -> Response:
    asked = await read_json(request, BulkChange)
    return json_response({"changed": await _change(request, server, asked.runs, asked.changes)})


@router.get("/runs/{run}", dependencies=[Depends(require("read", "checkpoint"))])
async def run_whole(server: Here, run: str) -> Response:
    return json_response(await server.ask(runs.show_run, run))


@router.patch("/runs/{run}", dependencies=ANNOTATE)
async def change(request: Request, server: Here, run: str) -> Response:
    await _change(request, server, [run], await read_json(request, Changes))
    return json_response(await server.ask(runs.show_run, run))


async def _change(
    request: Request, server: Server, chosen: list[str], changes: Changes
) -> list[str]:
    if "deleted" in changes.model_fields_set:
        await require("manage")(request)
    statuses = await server.write(runs.change_runs, chosen, changes)
    for run, status in statuses.items():
        server.hub.publish("run", {"run": run, "updated": time.time(), "status": status})
    return list(statuses)


@router.get("/settings", dependencies=READ)
async def settings(server: Here, project: Project = "") -> Response:
    return json_response(await server.ask(runs.list_settings, project))


@router.put("/settings", dependencies=ANNOTATE)
async def save(
    request: Request, server: Here, kind: str, name: str, project: Project = ""
) -> Response:
    content = await read_json(request, dict[str, Any])
    await server.write(runs.save_setting, project, kind, name, content)
    return json_response({"kind": kind, "name": name})


@router.delete("/settings", dependencies=ANNOTATE)
async def forget(server: Here, kind: str, name: str, project: Project = "") -> Response:
    await server.write(runs.save_setting, project, kind, name, None)
    return json_response({"kind": kind, "name": name})


@router.get("/runs/{run}/series", dependencies=READ)
async def series(server: Here, run: str, query: Annotated[ChartQuery, Query()]) -> Response:
    def read(db: Connection) -> Response:
        began = time.perf_counter()
        found = read_chart(db, find_run(db, run), query)
        answer = json_response({"run": run, "x": query.x, "series": found})
        milliseconds = (time.perf_counter() - began) * 1000
        answer.headers["Server-Timing"] = f"series;dur={milliseconds:.3f}"
        return answer

    return await server.ask(read)


def _add_records(kind: Kind) -> None:
    @router.get(f"/runs/{{run}}/{kind}", dependencies=READ)
    async def records(server: Here, run: str, page: Annotated[Page, Query()]) -> Response:
        found = await server.ask(lambda c: list_records(c, kind, find_run(c, run), page))
        return json_response({kind: found})


for _kind in KINDS:
    _add_records(_kind)


@router.get("/alerts", dependencies=READ)
async def alerts(
    server: Here, run: str | None = None, only_open: Annotated[bool, Query(alias="open")] = False
) -> Response:
    return json_response({"alerts": await server.ask(runs.list_alerts, run, only_open)})


@router.post("/alerts/{alert}/dismiss", dependencies=ANNOTATE)
async def dismiss(server: Here, alert: int) -> Response:
    run = await server.write(runs.dismiss_alert, alert)
    server.hub.publish("alert", {"run": run, "id": alert, "dismissed": True})
    return json_response({"id": alert, "dismissed": True})


@router.get("/events", dependencies=READ)
async def events(server: Here, run: str | None = None) -> Response:
    if len(server.hub) >= MOST_READERS:
        raise ApiError(503, "too many readers of events: close some pages", {"Retry-After": "30"})
    encoded = (
        {"event": kind, "data": orjson.dumps(content).decode()}
        async for kind, content in server.hub.read(run)
    )
    return EventSourceResponse(encoded, ping=PING_SECONDS, send_timeout=SLOW_READER_SECONDS)
