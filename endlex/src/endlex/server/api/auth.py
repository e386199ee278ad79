"""Who may do what: tokens with scopes, kept as hashes, and browsers' logins.

With `write` and `checkpoint` a token adds to its own runs, those that it created or was given, and
learns nothing of others: this is what a rented box gets. `protocol.SCOPES` has the other scopes.

A token is `endlex_` and 32 random bytes; only its SHA-256 is stored. A browser sends a token once
and gets a cookie with a random session id, stored hashed too, that dies with the token. On loopback
with no token ever made, nothing is asked. Each request looks its token up in the database, so that
one made or revoked on the command line counts at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Collection
from contextlib import closing
from pathlib import Path
from sqlite3 import Connection
from typing import Any, TypeVar
from urllib.parse import parse_qs

from fastapi import APIRouter, Request
from fastapi.responses import Response

from endlex.protocol import SCOPES, EndlexError, Scope, UsageError, check_name, check_run_id
from endlex.server.api.bodies import json_response, read_body
from endlex.server.errors import ApiError
from endlex.server.settings import DataDir, Settings
from endlex.server.store.database import Database, Pool, connect, dicts, insert, update

router = APIRouter(prefix="/api/v1")
T = TypeVar("T")
Granted = tuple[int, frozenset[str]]
"""A token's key and its scopes."""
BOX_SCOPES = frozenset({"write", "checkpoint"})
"""Scopes that open a token's own runs only."""
PREFIX = "endlex_"
COOKIE = "endlex_session"
LOGIN_SECONDS = 30 * 86400
LAST_USED_EVERY = 60.0
FAILURES = 10
FAILURE_SECONDS = 300.0
ADDRESSES_KEPT = 10_000
MOST_FORM_BYTES = 8192


def create_token(
    data_dir: Path, name: str, scopes: Collection[str], runs: Collection[str] = ()
) -> str:
    """Make a token and return it; this is the only time that it is seen.

    The data directory is made if missing; its server may be running. `runs` are ids of runs that
    become the token's own. A name, scope or id that is none is an `EndlexError`.
    """
    check_name(name, "token name")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        given = ", ".join(map(repr, unknown)) or "no scope"
        raise UsageError(f"{given}: a token's scopes are of {', '.join(SCOPES)}")
    token = PREFIX + secrets.token_urlsafe(32)
    kept = ",".join(scope for scope in SCOPES if scope in scopes)
    rows = [check_run_id(run) for run in {*runs}]
    with _database(data_dir) as db:
        about = {"name": name, "scopes": kept, "created": time.time()}
        pk = insert(db, "token", hash=hash_secret(token), **about)
        db.executemany("INSERT INTO token_run VALUES (?, ?)", [(pk, run) for run in rows])
    return token


def grant_runs(data_dir: Path, token: str, runs: list[str]) -> None:
    """Make runs a token's own, by ids or the token's name; what is none is an `EndlexError`."""
    with _database(data_dir) as db:
        pairs = [(pk, check_run_id(run)) for pk in _in_use(db, token) for run in runs]
        db.executemany("INSERT OR IGNORE INTO token_run VALUES (?, ?)", pairs)


def revoke_token(data_dir: Path, token: str) -> int:
    """Revoke tokens by id or by name, which ends their logins, and return how many they were.

    It is an `EndlexError` that none of that id or name still counts.
    """
    with _database(data_dir) as db:
        keys = _in_use(db, token)
        for pk in keys:
            update(db, "token", pk, revoked=time.time())
    return len(keys)


def _in_use(db: Connection, token: str) -> list[int]:
    column = "pk" if token.isdecimal() else "name"
    query = f"SELECT pk FROM token WHERE {column}=? AND revoked IS NULL"
    keys = [pk for (pk,) in db.execute(query, (token,))]
    if not keys:
        raise EndlexError(f"no token {token!r} is in use: `endlex token list` shows them")
    return keys


def list_tokens(data_dir: Path) -> list[dict[str, Any]]:
    """Return every token that was made, the revoked ones too, oldest first.

    `older_runs` says whether one also owns the runs made before runs had owners; `runs` are the
    others that it owns.
    """
    with _database(data_dir) as db:
        tokens = dicts(
            db,
            "SELECT pk AS id, name, scopes, created, last_used, revoked, runs_before != 0 AS "
            "older_runs, (SELECT group_concat(run) FROM token_run WHERE token=pk) AS runs "
            "FROM token ORDER BY pk",
        )
    for token in tokens:
        token["scopes"] = token["scopes"].split(",")
        token["runs"] = token["runs"].split(",") if token["runs"] else []
    return tokens


def _database(data_dir: Path) -> closing[Connection]:
    """Open the database of a data directory for a moment, beside a server or without one."""
    data = DataDir(Path(data_dir))
    data.create()
    return closing(connect(data.database))


def hash_secret(secret: str) -> str:
    """Return what is stored of a token or a login: they are random, so one hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


class Auth:
    """Decides which requests may pass; one per server."""

    def __init__(self, settings: Settings, database: Database, pool: Pool) -> None:
        self._settings, self._database, self._pool = settings, database, pool
        self._used: dict[int, float] = {}
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()
        """When each address sent its latest wrong tokens, the latest address last."""

    async def check(self, request: Request, scopes: tuple[str, ...], creates: bool = False) -> None:
        """Let a request pass that has one of `scopes`, for the run that its path names.

        With `creates` the request may create that run, which is then the token's own. An `ApiError`
        is 401 without a token that counts, 403 with one of other scopes or runs, or 429.
        """
        kind, _, sent = request.headers.get("authorization", "").partition(" ")
        secret = sent.strip() if kind.lower() == "bearer" else ""
        cookie = request.cookies.get(COOKIE)
        any_made, found = await self._ask(_find, secret, cookie)
        if not self._settings.public and not any_made:
            return
        if found is None:
            raise self._refusal(request, secret)
        token, granted = found
        if time.time() - self._used.get(token, 0) > LAST_USED_EVERY:
            now = self._used[token] = time.time()
            self._database.write(lambda db: update(db, "token", token, last_used=now))
        usable = granted.intersection(scopes)
        if not usable:
            has = ", ".join(scope for scope in SCOPES if scope in granted)
            raise ApiError(403, f"this token has no scope {' or '.join(scopes)}: it has {has}")
        run = request.path_params.get("run")
        if run is None or "manage" in granted or not usable <= BOX_SCOPES:
            return
        own = await self._ask(_owns, token, run)
        if own is None and creates:
            own = await self._write(lambda db: _claim(db, token, run))
        if own is False:
            raise ApiError(
                403,
                f"run {run[:40]!r} is not one of this token's own: `endlex token grant TOKEN RUN` "
                "on the server's machine makes it one",
            )

    async def _ask(self, question: Callable[..., T], *args: Any) -> T:
        return await self._pool(lambda: question(self._database.reader(), *args))

    async def _write(self, job: Callable[[Connection], T]) -> T:
        return await asyncio.wrap_future(self._database.write(job))

    async def login(self, request: Request, token: str) -> str:
        """Return the cookie for a browser that gave a token; a wrong one is an `ApiError`."""
        _, found = await self._ask(_find, token, None)
        if found is None:
            raise self._refusal(request, token)
        secret = secrets.token_urlsafe(32)
        now = time.time()
        row = {"hash": hash_secret(secret), "token": found[0], "created": now}

        def job(db: Connection) -> None:
            db.execute("DELETE FROM login WHERE expires < ?", (now,))
            insert(db, "login", expires=now + LOGIN_SECONDS, **row)

        await self._write(job)
        return secret

    def _refusal(self, request: Request, secret: str) -> ApiError:
        headers = {"WWW-Authenticate": "Bearer"}
        if not secret:
            return ApiError(401, "a token is needed: set ENDLEX_TOKEN, or log in", headers)
        address = request.client.host if request.client else ""
        times = self._failures.setdefault(address, deque(maxlen=FAILURES + 1))
        times.append(time.monotonic())
        self._failures.move_to_end(address)
        if len(self._failures) > ADDRESSES_KEPT:
            self._failures.popitem(last=False)
        # Right tokens pass: a bad box locks out no other.
        if len(times) > FAILURES and times[-1] - times[0] < FAILURE_SECONDS:
            wait = {"Retry-After": "60"}
            return ApiError(429, "too many wrong tokens from this address: wait a while", wait)
        message = "the token is not known, or revoked: make one with `endlex token create`"
        return ApiError(401, message, headers)


def _find(db: Connection, secret: str, cookie: str | None) -> tuple[bool, Granted | None]:
    """Return whether any token was ever made, and the one that a request carries.

    Only hashes of random secrets are compared, so the time that this takes reveals nothing.
    """
    any_made = db.execute("SELECT 1 FROM token LIMIT 1").fetchone() is not None
    row = db.execute(
        "SELECT pk, scopes FROM token WHERE revoked IS NULL AND (hash=? OR "
        "pk=(SELECT token FROM login WHERE hash=? AND expires > ?))",
        (hash_secret(secret), hash_secret("" if secret else cookie or ""), time.time()),
    ).fetchone()
    return any_made, (row[0], frozenset(row[1].split(","))) if row else None


def _owns(db: Connection, token: int, run: str) -> bool | None:
    """Whether a run is a token's own; None if there is no such run, and it is nobody's."""
    claims = db.execute(
        "SELECT token FROM token_run JOIN token ON pk = token WHERE run=? AND revoked IS NULL",
        (run,),
    ).fetchall()
    query = "SELECT run.pk <= token.runs_before FROM run, token WHERE run.id=? AND token.pk=?"
    row = db.execute(query, (run, token)).fetchone()
    if (token,) in claims or (row and row[0]):
        return True
    return False if row or claims else None


def _claim(db: Connection, token: int, run: str) -> bool:
    """Make a run that a token is about to create its own; False if it is another's."""
    if _owns(db, token, run) is False:
        return False
    db.execute("INSERT OR IGNORE INTO token_run VALUES (?, ?)", (token, run))
    return True


def require(*scopes: Scope, creates: bool = False) -> Callable[[Request], Awaitable[None]]:
    """Return the dependency of a route that any one of `scopes` opens (`Auth.check`)."""

    async def check(request: Request) -> None:
        await request.app.state.server.auth.check(request, scopes, creates)

    return check


@router.post("/login")
async def login(request: Request) -> Response:
    form = parse_qs((await read_body(request, MOST_FORM_BYTES)).decode("utf-8", "replace"))
    secret = await request.app.state.server.auth.login(request, form.get("token", [""])[0].strip())
    answer = json_response({"logged_in": True})
    secure = request.url.scheme == "https"
    answer.set_cookie(COOKIE, secret, LOGIN_SECONDS, secure=secure, **_cookie(request))
    return answer


@router.post("/logout")
async def logout(request: Request) -> Response:
    if cookie := request.cookies.get(COOKIE):
        query, values = "DELETE FROM login WHERE hash=?", (hash_secret(cookie),)
        await request.app.state.server.write(lambda db: db.execute(query, values).rowcount)
    answer = json_response({"logged_in": False})
    answer.delete_cookie(COOKIE, **_cookie(request))
    return answer


def _cookie(request: Request) -> dict[str, Any]:
    path = request.app.state.settings.root_path or "/"
    return {"path": path, "httponly": True, "samesite": "strict"}
