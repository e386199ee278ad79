"""Logging a browser in and out: a token once, then a cookie that scripts cannot read."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import Response

from endlex.server.api.auth import COOKIE, LOGIN_SECONDS, hash_secret
from endlex.server.api.bodies import json_response, read_body
from endlex.server.state import Here

router = APIRouter(prefix="/api/v1")

MOST_FORM_BYTES = 8192


@router.post("/login")
async def login(request: Request, server: Here) -> Response:
    form = parse_qs((await read_body(request, MOST_FORM_BYTES)).decode("utf-8", "replace"))
    secret = await server.auth.login(request, form.get("token", [""])[0].strip())
    answer = json_response({"logged_in": True})
    answer.set_cookie(
        COOKIE,
        secret,
        max_age=LOGIN_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path=server.settings.root_path or "/",
    )
    return answer


@router.post("/logout")
async def logout(request: Request, server: Here) -> Response:
    if cookie := request.cookies.get(COOKIE):
        query, values = "DELETE FROM login WHERE hash=?", (hash_secret(cookie),)
        await server.write(lambda c: c.execute(query, values).rowcount)
    answer = json_response({"logged_in": False})
    path = server.settings.root_path or "/"
    answer.delete_cookie(COOKIE, path=path, httponly=True, samesite="strict")
    return answer
