"""Who may do what, and where a request may come from."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fastapi import Request

from endlex.protocol import SCOPES, EndlexError
from endlex.server.api import auth
from endlex.server.api.auth import create_token, grant_runs, list_tokens, revoke_token
from endlex.server.app import serve
from endlex.server.errors import ApiError
from endlex.server.settings import DataDir, Settings
from endlex.server.store.database import connect

RUN = "testrun001"
HASH = "0" * 64
ROUTES = [
    ("GET", "/api/v1/runs", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}", {"read", "checkpoint"}),
    ("PATCH", f"/api/v1/runs/{RUN}", {"annotate", "manage"}),
    ("GET", f"/api/v1/runs/{RUN}/series?metric=a", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/texts", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/media", {"read"}),
    ("GET", f"/api/v1/runs/{RUN}/media/1", {"read"}),
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
    ("DELETE", f"/api/v1/runs/{RUN}/checkpoints/c", {"manage"}),
    ("POST", "/api/v1/prune", {"manage"}),
    ("GET", "/api/v1/alerts", {"read"}),
    ("POST", "/api/v1/alerts/1/dismiss", {"annotate", "manage"}),
    ("PATCH", "/api/v1/runs", {"annotate", "manage"}),
    ("GET", "/api/v1/settings", {"read"}),
    ("PUT", "/api/v1/settings?kind=view&name=x", {"annotate", "manage"}),
    ("DELETE", "/api/v1/settings?kind=view&name=x", {"annotate", "manage"}),
]


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_every_route_of_the_api_is_in_the_list(client: Any) -> None:
    """A route that somebody adds is to be tried with every scope below."""
    known = {path.split("?")[0].replace(RUN, "{run}") for _, path, _ in ROUTES}
    for old, new in (("/s1", "/{session}"), ("checkpoints/c", "checkpoints/{name}")):
        known |= {path.replace(old, new) for path in known}
    known |= {"/api/v1/parts/{sha256}", "/api/v1/runs/{run}/media/{item}"}
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


@pytest.mark.parametrize("scope", list(SCOPES))
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


@pytest.mark.parametrize("scope", list(SCOPES))
def test_one_scope_alone_deletes_runs(
    start: Callable[..., Any], data_dir: Path, make_box: Callable[..., Any], scope: str
) -> None:
    make_box(start(), run=RUN).begin()
    client = start(public=True)
    who = bearer(create_token(data_dir, "who", [scope]))
    one = client.patch(f"/api/v1/runs/{RUN}", json={"deleted": True}, headers=who)
    changes = {"runs": [RUN], "changes": {"deleted": True, "archived": True}}
    many = client.patch("/api/v1/runs", json=changes, headers=who)
    pruned = client.post("/api/v1/prune", json={"deleted": True}, headers=who)
    expected = 200 if scope == "manage" else 403
    assert [one.status_code, many.status_code, pruned.status_code] == [expected] * 3


@pytest.fixture
def two_boxes(
    start: Callable[..., Any], data_dir: Path, make_box: Callable[..., Any]
) -> tuple[Any, Any, Any]:
    """A client, and two boxes with a token and a run each; the first has published a checkpoint."""
    client = start(public=True)
    boxes = []
    for run in ("runofbox0001", "runofbox0002"):
        token = create_token(data_dir, run, ["write", "checkpoint"])
        box = make_box(_Signed(client, token), run=run)
        box.begin()
        boxes.append(box)
    boxes[0].publish("c", {"f": b"weights"})
    return client, *boxes


class _Signed:
    """A client that sends one token."""

    def __init__(self, client: Any, token: str) -> None:
        self._client, self.headers = client, bearer(token)

    def __getattr__(self, method: str) -> Callable[..., Any]:
        def ask(*arguments: Any, headers: Any = None, **options: Any) -> Any:
            headers = {**(headers or {}), **self.headers}
            return getattr(self._client, method)(*arguments, headers=headers, **options)

        return ask


def test_a_box_adds_to_its_own_runs_and_learns_nothing_of_others(
    two_boxes: tuple[Any, Any, Any], data_dir: Path
) -> None:
    _, mine, other = two_boxes
    theirs = f"/api/v1/runs/{mine.run}"
    assert mine.client.get(theirs).status_code == 200
    tries = [
        other.client.get(theirs),
        other.client.get(f"{theirs}/sessions"),
        other.client.get(f"{theirs}/checkpoints/c/files/f"),
        other.client.get(mine.url),
        other.client.post(mine.url, params={"offset": 0, "crc": "00000000"}, content=b""),
        other.client.post(f"{theirs}/sessions/{mine.session}/state", json={"status": "failed"}),
        other.client.put(f"{theirs}/checkpoints/d", json={}),
    ]
    assert [answer.status_code for answer in tries] == [403] * len(tries)
    assert all("endlex token grant" in answer.json()["error"] for answer in tries)
    assert not any("tests" in answer.text for answer in tries)  # the project's name
    grant_runs(data_dir, other.run, [mine.run])
    assert other.client.get(theirs).status_code == 200
    assert list_tokens(data_dir)[1]["runs"] == [mine.run, other.run]


def test_a_box_destroys_nothing_not_even_its_own(two_boxes: tuple[Any, Any, Any]) -> None:
    _, box, _ = two_boxes
    own = f"/api/v1/runs/{box.run}"
    for answer in (
        box.client.delete(f"{own}/checkpoints/c"),
        box.client.patch(own, json={"deleted": True}),
        box.client.post("/api/v1/prune", json={"keep_last": 1, "dry_run": True}),
        box.client.post("/api/v1/prune", json={"deleted": True}),
    ):
        assert answer.status_code == 403, answer.text
    # Nor by saying afterwards that a newer one replaces it.
    later = box.manifest_of("c", {"f": b"weights"}, metadata={"replaces": "last"})
    assert box.put_manifest("c", later).status_code == 200
    box.publish("d", {"f": b"more"}, created=2e9, metadata={"replaces": "last"})
    states = {c["name"]: c["state"] for c in box.client.get(f"{own}/checkpoints").json()}
    assert states == {"c": "published", "d": "published"}


def test_who_annotates_does_not_delete(two_boxes: tuple[Any, Any, Any], data_dir: Path) -> None:
    client, box, _ = two_boxes
    own = f"/api/v1/runs/{box.run}"
    person = bearer(create_token(data_dir, "me", ["read", "annotate"]))
    assert client.patch(own, json={"tags": ["good"], "archived": True}, headers=person).json()
    assert client.patch(own, json={"deleted": True}, headers=person).status_code == 403
    owner = bearer(create_token(data_dir, "owner", ["manage"]))
    assert client.patch(own, json={"deleted": True}, headers=owner).status_code == 200


def test_tokens_of_before_keep_their_boxes_at_work_and_lose_the_rest(
    start: Callable[..., Any], data_dir: Path, make_box: Callable[..., Any]
) -> None:
    box = make_box(start())
    box.begin()
    old = create_token(data_dir, "old", ["write", "checkpoint", "read"])
    with connect(DataDir(data_dir).database) as connection:
        connection.execute("DROP TABLE token_run")
        connection.execute("ALTER TABLE token DROP COLUMN runs_before")
        connection.execute("ALTER TABLE session DROP COLUMN heard")
        for table in ("run_config", "setting", "media", "media_part"):
            connection.execute(f"DROP TABLE {table}")
        connection.execute("ALTER TABLE run DROP COLUMN color")
        connection.execute("PRAGMA user_version=2")
    client = start(public=True)
    box.client = _Signed(client, old)
    box.send([box.metrics(1, {"a": 1.0})])
    assert box.client.delete(f"/api/v1/runs/{RUN}/checkpoints/c").status_code == 403
    assert box.client.patch(f"/api/v1/runs/{RUN}", json={"archived": True}).status_code == 403
    new = make_box(client, run="runofanother")
    new.client = _Signed(client, create_token(data_dir, "new", ["write"]))
    new.begin()
    foreign = make_box(box.client, run=new.run, session="other")
    refused = foreign.post(foreign.lines([foreign.session_record()]), 0)
    assert refused.status_code == 403
    assert [token["older_runs"] for token in list_tokens(data_dir)] == [True, False]


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


def refuse(client: Any, addresses: list[str]) -> list[int]:
    """Log in with a wrong token from each address in turn; return the statuses."""

    async def log_in() -> list[int]:
        statuses = []
        for address in addresses:
            request = Request({"type": "http", "client": (address, 1)})
            with pytest.raises(ApiError) as refused:
                await client.app.state.server.auth.login(request, "wrong")
            statuses.append(refused.value.status)
        return statuses

    return client.portal.call(log_in)  # type: ignore[no-any-return]


def test_wrong_tokens_of_other_addresses_hide_none(client: Any) -> None:
    addresses = [f"10.0.0.{number}" for number in range(100)]
    statuses = refuse(client, addresses * 12)
    assert statuses == [401] * 1000 + [429] * 200


def test_wrong_tokens_are_remembered_of_the_latest_addresses(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "ADDRESSES_KEPT", 2)
    assert refuse(client, ["a"] * 10 + ["b", "a"])[-1] == 429
    assert refuse(client, ["b", "c", "a"])[-1] == 401


def test_tokens_are_kept_as_hashes_and_can_be_revoked_while_the_server_runs(
    start: Callable[..., Any], data_dir: Path
) -> None:
    client = start()
    assert client.get("/api/v1/runs").status_code == 200  # loopback, and no token made
    token = create_token(data_dir, "box", ["write", "read"])
    assert token.startswith("endlex_")
    assert client.get("/api/v1/runs", headers=bearer(token)).status_code == 200
    assert client.get("/api/v1/runs").status_code == 401
    for path in data_dir.glob("endlex.sqlite3*"):
        assert token.encode() not in path.read_bytes()
    info = list_tokens(data_dir)[0]
    assert (info["name"], info["scopes"], info["revoked"]) == ("box", ["write", "read"], None)
    assert revoke_token(data_dir, str(info["id"])) == 1
    assert client.get("/api/v1/runs", headers=bearer(token)).status_code == 401
    with pytest.raises(EndlexError, match="token list"):
        revoke_token(data_dir, "box")
    with pytest.raises(EndlexError, match="admin"):
        create_token(data_dir, "box", ["admin"])


def test_a_browser_logs_in_once_and_out(start: Callable[..., Any], data_dir: Path) -> None:
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True)
    assert client.post("/api/v1/login", data={"token": "x"}).status_code == 401
    answer = client.post("/api/v1/login", data={"token": token})
    assert (answer.status_code, answer.json()) == (200, {"logged_in": True})
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
    assert client.get("/api/v1/runs").status_code == 401


def test_the_cookie_is_secure_where_the_page_is(start: Callable[..., Any], data_dir: Path) -> None:
    token = create_token(data_dir, "me", ["read"])
    client = start(public=True)
    answer = client.post("https://127.0.0.1/api/v1/login", data={"token": token})
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
    token = create_token(data_dir, "box", ["manage"])
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
    client.post("/api/v1/login", data={"token": token})
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
