"""Logging a browser in and out: a token once, then a cookie that scripts cannot read."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from endlex.server.api.auth import COOKIE, LOGIN_SECONDS
from endlex.server.api.bodies import json_response, read_body
from endlex.server.errors import ApiError
from endlex.server.state import server_of

router = APIRouter()

MOST_FORM_BYTES = 8192


@router.post("/login")
@router.post("/api/v1/login")
async def login(request: Request) -> Response:
    form = parse_qs((await read_body(request, MOST_FORM_BYTES)).decode("utf-8", "replace"))
    token = form.get("token", [""])[0].strip()
    page = "text/html" in request.headers.get("accept", "")
    root = server_of(request).settings.root_path
    try:
        secret = await server_of(request).auth.login(request, token)
    except ApiError as error:
        if page and error.status == 401:
            return RedirectResponse(f"{root}/login?failed=1", 303)
        raise
    place = root + _own_path(form.get("next", ["/"])[0])
    answer = RedirectResponse(place, 303) if page else json_response({"logged_in": True})
    answer.set_cookie(
        COOKIE,
        secret,
        max_age=LOGIN_SECONDS,
        httponly=True,
        samesite="strict",
        secure=request.url.scheme == "https",
        path=root or "/",
    )
    return answer


@router.post("/logout")
@router.post("/api/v1/logout")
async def logout(request: Request) -> Response:
    cookie = request.cookies.get(COOKIE)
    if cookie:
        await server_of(request).auth.logout(cookie)
    page = "text/html" in request.headers.get("accept", "")
    root = server_of(request).settings.root_path
    answer = RedirectResponse(f"{root}/login", 303) if page else json_response({"logged_in": False})
    answer.delete_cookie(COOKIE, path=root or "/", httponly=True, samesite="strict")
    return answer


def _own_path(place: str) -> str:
    """Return a path of this server to go on at; an address of another becomes the first page."""
    own = place.startswith("/") and not place.startswith(("//", "/\\")) and place.isprintable()
    return place if own else "/"
