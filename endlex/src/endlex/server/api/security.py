"""Checks before every route: to whom a request is addressed and where it comes from.

On loopback without tokens anything that runs on the machine may read and write. What must not get
there are pages of other sites in the owner's browser: a request must name a loopback host (DNS
rebinding), and one that changes something must not come from another origin.
"""

from __future__ import annotations

import ipaddress
from contextlib import suppress
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from endlex.server.api.bodies import json_response
from endlex.server.settings import Settings

POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; "
    "form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def is_loopback(host: str) -> bool:
    """Whether a host name or address, without a port, is this machine's own."""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host.lower() == "localhost"


class Guard:
    """ASGI middleware that refuses what is misaddressed or foreign, and adds security headers."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        root = self._settings.root_path
        if root and (scope["path"] == root or scope["path"].startswith(f"{root}/")):
            scope = {**scope, "path": scope["path"].removeprefix(root) or "/"}

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
                is_data = scope["path"].startswith("/api/")  # the rest has entity tags, or is short
                headers.setdefault("Cache-Control", "no-store" if is_data else "no-cache")
            await send(message)

        refusal = self._refusal(scope["method"], Headers(scope=scope))
        app = self._app
        if refusal is not None:
            app = json_response({"error": refusal}, 403, {"Connection": "close"})
        await app(scope, receive, send_with_headers)

    def _refusal(self, method: str, headers: Headers) -> str | None:
        host, name = headers.get("host", ""), ""
        with suppress(ValueError):
            name = urlsplit(f"//{host}").hostname or ""  # without the port and brackets
        if not self._settings.public and not is_loopback(name):
            return (
                f"host {host[:80]!r} is not a name of this machine: serve others with "
                "`endlex serve --public` and tokens"
            )
        if method in SAFE_METHODS:
            return None
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return "a page of another site may not write here"
        origin, hosts = headers.get("origin"), {host.lower()}
        if self._settings.trusted_proxy:
            hosts.add(headers.get("x-forwarded-host", host).lower())
        if origin is None or (origin != "null" and urlsplit(origin).netloc.lower() in hosts):
            return None
        return f"origin {origin[:80]!r} may not write here: open the page at {host[:80]!r}"
