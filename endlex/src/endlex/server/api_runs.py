"""Routes for what people look at: runs, their metadata, charts, texts and tables."""

from __future__ import annotations

import time
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from endlex.server.api_journal import find_run
from endlex.server.auth import require
from endlex.server.bodies import json_response
from endlex.server.charts import ChartQuery, read_chart
from endlex.server.errors import ApiError
from endlex.server.state import server_of

router = APIRouter(prefix="/api/v1")

MOST_METRICS = 500
"""In one request for series."""


@router.get("/runs/{run}/series", dependencies=[Depends(require("read"))])
async def series(
    request: Request,
    run: str,
    metric: Annotated[list[str], Query()],
    x: str = "step",
    first: Annotated[float, Query(alias="from")] = -np.inf,
    last: Annotated[float, Query(alias="to")] = np.inf,
    points: Annotated[int, Query(ge=4, le=100_000)] = 2000,
) -> Response:
    if len(metric) > MOST_METRICS:
        raise ApiError(422, f"{len(metric)} metrics at once; at most {MOST_METRICS}: ask again")
    if np.isnan(first) or np.isnan(last):
        raise ApiError(422, "from and to must be numbers")
    server = server_of(request)
    query = ChartQuery(tuple(dict.fromkeys(metric)), x, first, last, points)

    def read() -> tuple[Response, float]:
        began = time.perf_counter()
        with server.database.snapshot() as connection:
            found: dict[str, Any] = read_chart(connection, find_run(connection, run), query)
        answer = json_response({"run": run, "x": x, "series": found})
        return answer, (time.perf_counter() - began) * 1000

    answer, milliseconds = await server.workers.read(read)
    answer.headers["Server-Timing"] = f"series;dur={milliseconds:.3f}"
    return answer
