"""Logging a browser in and out: a token once, then a cookie that scripts cannot read."""

from __future__ import annotations

from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import RedirectResponse, Response

from endlex.server.api.auth import COOKIE, LOGIN_SECONDS
from endlex.server.api.bodies import json_response, read_body
from endlex.server.errors import ApiError
from endlex.server.state import Here

router = APIRouter()

MOST_FORM_BYTES = 8192


@router.post("/login")
@router.post("/api/v1/login")
async def login(request: Request, server: Here) -> Response:
    form = parse_qs((await read_body(request, MOST_FORM_BYTES)).decode("utf-8", "replace"))
    token = form.get("token", [""])[0].strip()
    root = server.settings.root_path
    try:
        secret = await server.auth.login(request, token)
    except ApiError as error:
        if _is_page(request) and error.status == 401:
            return RedirectResponse(f"{root}/login?failed=1", 303)
        raise
    place = form.get("next", ["/"])[0]
    if not place.startswith("/") or place.startswith(("//", "/\\")) or not place.isprintable():
        place = "/"  # it leads to another site
    answer = json_response({"logged_in": True})
    if _is_page(request):
        answer = RedirectResponse(root + place, 303)
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
async def logout(request: Request, server: Here) -> Response:
    cookie = request.cookies.get(COOKIE)
    if cookie:
        await server.auth.logout(cookie)
    root = server.settings.root_path
    answer = json_response({"logged_in": False})
    if _is_page(request):
        answer = RedirectResponse(f"{root}/login", 303)
    answer.delete_cookie(COOKIE, path=root or "/", httponly=True, samesite="strict")
    return answer


def _is_page(request: Request) -> bool:
    return "text/html" in request.headers.get("accept", "")
