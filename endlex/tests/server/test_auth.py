"""Who may do what, and where a request may come from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from endlex.protocol import EndlexError
from endlex.server.app import serve
from endlex.server.auth import create_token, list_tokens, revoke_token
from endlex.server.settings import Settings

RUN = "testrun001"
HASH = "0" * 64
ROUTES = [
    ("GET", "/api/v1/runs", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}", {"read", "checkpoint"}),
    ("PATCH", f"/api/v1/runs/{RUN}", {"write"}),
    ("GET", f"/api/v1/runs/{RUN}/series?metric=a", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/texts", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/tables", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/export?format=csv", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/sessions", {"read", "write"}),
    ("POST", f"/api/v1/runs/{RUN}/sessions/s1/journal?offset=0&crc=00000000", {"write"}),
    ("GET", f"/api/v1/runs/{RUN}/sessions/s1/journal", {"read", "write"}),
    ("GET", f"/api/v1/runs/{RUN}/sessions/s1/journal/raw", {"read"}),
    ("POST", f"/api/v1/runs/{RUN}/sessions/s1/state", {"write"}),
    ("POST", "/api/v1/parts/missing", {"checkpoint"}),
    ("PUT", f"/api/v1/parts/{HASH}", {"checkpoint"}),
    ("PUT", f"/api/v1/runs/{RUN}/checkpoints/c", {"checkpoint"}),
    ("GET", f"/api/v1/runs/{RUN}/checkpoints", {"read", "checkpoint"}),
    ("GET", f"/api/v1/runs/{RUN}/checkpoints/c", {"read", "checkpoint"}),
    ("GET", f"/api/v1/runs/{RUN}/checkpoints/c/files/f", {"read", "checkpoint"}),
    ("DELETE", f"/api/v1/runs/{RUN}/checkpoints/c", {"checkpoint"}),
    ("POST", "/api/v1/prune", {"checkpoint"}),
    ("GET", "/api/v1/alerts", {"read"}),
    ("POST", "/api/v1/alerts/1/dismiss", {"write"}),
]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_every_route_of_the_api_is_in_the_list(client: Any) -> None:
    """A route that somebody adds is to be tried with every scope below."""
    known = {path.split("?")[0].replace(RUN, "{run}") for _, path, _ in ROUTES}
    for old, new in (("/s1", "/{session}"), ("checkpoints/c", "checkpoints/{name}")):
        known |= {path.replace(old, new) for path in known}
    known.add("/api/v1/parts/{sha256}")
    known |= {"/api/v1/alerts/{alert}/dismiss", "/api/v1/events"}
    known.add("/api/v1/runs/{run}/checkpoints/{name}/files/{path:path}")
    paths = set(_paths(client.app.routes))
    assert "/api/v1/runs" in paths
    unguarded = {"/api/v1/login", "/api/v1/logout"}
    assert {p for p in paths if p.startswith("/api/")} <= known | unguarded


def _paths(routes: Any) -> list[str]:
    found = []
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            found += _paths(inner.routes)
        elif hasattr(route, "path"):
            found.append(route.path)
    return found


@pytest.mark.parametrize("scope", ["read", "write", "checkpoint"])
def test_a_token_opens_its_scope_and_no_other(
    start: Callable[..., Any], data_dir: Path, scope: str
) -> None:
    token = create_token(data_dir, "box", [scope])
    client = start(public=True)
    for method, path, scopes in ROUTES:
        answer = client.request(method, path, headers=bearer(token))
        if scope in scopes:
            assert answer.status_code not in (401, 403), (method, path, answer.text)
        else:
            assert answer.status_code == 403, (method, path, answer.text)
            assert scope in answer.json()["error"]


def test_without_a_token_there_is_nothing_but_health(
    start: Callable[..., Any], data_dir: Path
) -> None:
    token = create_token(data_dir, "box", ["read", "write", "checkpoint"])
    client = start(public=True)
    assert client.get("/health").status_code == 200
    for headers in ({}, bearer(token[:-1]), bearer("x" * 5000), {"Authorization": token}):
        for method, path, _ in ROUTES:
            status = client.request(method, path, headers=headers).status_code
            assert status in (401, 429), (method, path)
    assert client.get("/api/v1/runs", headers=bearer(token)).status_code == 200
    wrong = client.get("/api/v1/runs", headers=bearer("wrong"))
    assert (wrong.status_code, "Retry-After" in wrong.headers) == (429, True)
    assert client.get("/api/v1/runs", params={"token": token}).status_code == 401


def test_tokens_are_kept_as_hashes_and_can_be_revoked_while_the_server_runs(
    start: Callable[..., Any], data_dir: Path
) -> None:
    client = start()
    assert client.get("/api/v1/runs").status_code == 200  # loopback, and no token made
    token = create_token(data_dir, "box", ["write", "read"])
    assert token.startswith("endlex_")
    assert client.get("/api/v1/runs", headers=bearer(token)).status_code == 200
    _expire(client)
    assert client.get("/api/v1/runs").status_code == 401
    for path in data_dir.glob("endlex.sqlite3*"):
        assert token.encode() not in path.read_bytes()
    info = list_tokens(data_dir)[0]
    assert (info.name, info.scopes, info.revoked) == ("box", ("write", "read"), None)
    assert revoke_token(data_dir, info.id) == 1
    _expire(client)
    assert client.get("/api/v1/runs", headers=bearer(token)).status_code == 401
    with pytest.raises(EndlexError, match="token list"):
        revoke_token(data_dir, "box")
    with pytest.raises(EndlexError, match="admin"):
        create_token(data_dir, "box", ["admin"])


def _expire(client: Any) -> None:
    """Let what the server knows of tokens be older than it believes without looking."""
    auth = client.app.state.server.auth
    known = auth._known
    auth._known = type(known)(-1e9, known.any_made, known.tokens, known.logins)


def test_a_browser_logs_in_once_and_out(start: Callable[..., Any], data_dir: Path) -> None:
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True)
    page = {"Accept": "text/html"}
    failed = client.post("/login", data={"token": "x"}, headers=page, follow_redirects=False)
    assert (failed.status_code, failed.headers["location"]) == (303, "/login?failed=1")
    assert client.post("/api/v1/login", data={"token": "x"}).status_code == 401
    answer = client.post(
        "/login", data={"token": token, "next": "//evil"}, headers=page, follow_redirects=False
    )
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie
    assert token.lower() not in cookie
    assert client.get("/api/v1/runs").status_code == 200
    assert client.post("/api/v1/logout").status_code == 200
    assert client.get("/api/v1/runs").status_code == 401


def test_a_revoked_token_ends_its_logins(start: Callable[..., Any], data_dir: Path) -> None:
    create_token(data_dir, "other", ["read"])
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True)
    client.post("/api/v1/login", data={"token": token})
    assert client.get("/api/v1/runs").status_code == 200
    revoke_token(data_dir, "me")
    _expire(client)
    assert client.get("/api/v1/runs").status_code == 401


def test_the_cookie_is_secure_where_the_page_is(start: Callable[..., Any], data_dir: Path) -> None:
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True)
    answer = client.post("https://127.0.0.1/login", data={"token": token})
    assert "secure" in answer.headers["set-cookie"].lower()


def test_other_sites_cannot_write_here_nor_rebind_names(client: Any) -> None:
    body = {"keep_last": 1}
    for headers in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Host": "evil.example"},
        {"Host": "evil.example:8817", "Origin": "http://evil.example:8817"},
        {"Host": "127.0.0.1.evil.example"},
    ):
        answer = client.post("/api/v1/prune", json=body, headers=headers)
        assert answer.status_code == 403, headers
    for host in ("evil.example", "", "127.0.0.1.evil.example"):
        assert client.get("/api/v1/runs", headers={"Host": host}).status_code == 403
    for headers in (
        {},
        {"Host": "localhost:1"},
        {"Host": "[::1]:8817"},
        {"Host": "localhost", "Origin": "http://localhost", "Sec-Fetch-Site": "same-origin"},
    ):
        assert client.post("/api/v1/prune", json=body, headers=headers).status_code == 200


def test_a_proxy_s_name_counts_only_when_the_proxy_is_trusted(
    start: Callable[..., Any], data_dir: Path
) -> None:
    token = create_token(data_dir, "box", ["checkpoint"])
    headers = bearer(token) | {"Origin": "https://runs.example", "X-Forwarded-Host": "runs.example"}
    for proxy, status in ((None, 403), ("127.0.0.1", 200)):
        client = start(public=True, trusted_proxy=proxy)
        answer = client.post("/api/v1/prune", json={"keep_last": 1}, headers=headers)
        assert answer.status_code == status
        client.__exit__(None, None, None)


def test_answers_carry_security_headers(client: Any) -> None:
    for path in ("/health", "/api/v1/runs", "/nothing"):
        headers = client.get(path).headers
        assert "default-src 'self'" in headers["content-security-policy"]
        assert "frame-ancestors 'none'" in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"


def test_no_token_is_logged(
    start: Callable[..., Any], data_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "endlex")
    token = create_token(data_dir, "box", ["read"])
    client = start(public=True)
    client.get("/api/v1/runs", headers=bearer(token))
    client.get("/api/v1/runs", headers=bearer(token + "x"))
    client.post("/login", data={"token": token})
    assert token not in caplog.text


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        (Settings(host="0.0.0.0", port=0), "--public"),
        (Settings(host="0.0.0.0", port=0, public=True), "token create"),
        (Settings(public=True, port=0), "token create"),
    ],
)
def test_a_server_that_would_let_strangers_in_does_not_start(
    data_dir: Path, settings: Settings, word: str
) -> None:
    with pytest.raises(EndlexError, match=word):
        serve(data_dir, settings)
