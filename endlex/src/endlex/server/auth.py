"""Who may do what: tokens with scopes, kept as hashes, and browsers' logins.

A token is `endlex_` and 32 random bytes; only its SHA-256 is stored. A browser sends a token once
and gets a cookie with a random session id, stored hashed too, that dies with the token. On loopback
with no token ever made, nothing is asked. Tokens are read from the database anew after a second, so
that one made or revoked on the command line counts at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import secrets
import sqlite3
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from fastapi import Request

from endlex.protocol import EndlexError, check_name
from endlex.server.database import Database, connect
from endlex.server.errors import ApiError
from endlex.server.settings import DataDir, Settings
from endlex.server.workers import Workers

Scope = Literal["write", "checkpoint", "read"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

PREFIX = "endlex_"
COOKIE = "endlex_session"
LOGIN_SECONDS = 30 * 86400
KNOWN_FOR_SECONDS = 1.0
LAST_USED_EVERY = 60.0
FAILURES = 10
FAILURE_SECONDS = 300.0
ADDRESSES_KEPT = 10_000


@dataclass(frozen=True)
class TokenInfo:
    """A token as it may be shown; times in Unix seconds."""

    id: int
    name: str
    scopes: tuple[str, ...]
    created: float
    last_used: float | None
    revoked: float | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def create_token(data_dir: Path, name: str, scopes: tuple[str, ...] | list[str]) -> str:
    """Make a token and return it; this is the only time that it is seen.

    Args:
        data_dir: the server's; made if missing. The server may be running.
        name: for people, such as the box that it is for.
        scopes: of `SCOPES`.

    Raises:
        EndlexError: the name or a scope is not one.
    """
    check_name(name, "token name")
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown or not scopes:
        given = ", ".join(map(repr, unknown)) or "no scope"
        raise EndlexError(f"{given}: a token's scopes are of {', '.join(SCOPES)}")
    token = PREFIX + secrets.token_urlsafe(32)
    kept = ",".join(scope for scope in SCOPES if scope in scopes)
    with _database(data_dir) as connection:
        connection.execute(
            "INSERT INTO token (name, hash, scopes, created) VALUES (?, ?, ?, ?)",
            (name, hash_secret(token), kept, time.time()),
        )
    return token


def list_tokens(data_dir: Path) -> list[TokenInfo]:
    """Return every token that was made, the revoked ones too, oldest first."""
    with _database(data_dir) as connection:
        rows = connection.execute(
            "SELECT pk, name, scopes, created, last_used, revoked FROM token ORDER BY pk"
        ).fetchall()
    return [TokenInfo(pk, name, tuple(s.split(",")), *rest) for pk, name, s, *rest in rows]


def revoke_token(data_dir: Path, token: int | str) -> int:
    """Revoke by id or by name and return how many that were; logins with them end.

    Raises:
        EndlexError: there is none of that id or name that still counts.
    """
    column = "pk" if isinstance(token, int) else "name"
    with _database(data_dir) as connection:
        changed = connection.execute(
            f"UPDATE token SET revoked=? WHERE {column}=? AND revoked IS NULL",
            (time.time(), token),
        ).rowcount
    if not changed:
        raise EndlexError(f"no token {token!r} is in use: `endlex token list` shows them")
    return changed


class _database:
    """The database of a data directory, open for a moment, beside a server or without one."""

    def __init__(self, data_dir: Path) -> None:
        self._data = DataDir(Path(data_dir))

    def __enter__(self) -> sqlite3.Connection:
        self._data.create()
        self._connection = connect(self._data.database)
        return self._connection

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def hash_secret(secret: str) -> str:
    """Return what is stored of a token or a login: they are random, so one hash is enough."""
    return hashlib.sha256(secret.encode()).hexdigest()


@dataclass(frozen=True)
class _Known:
    """The tokens that count and the logins made with them, as read at one moment."""

    read: float
    any_made: bool
    tokens: tuple[tuple[str, int, frozenset[str]], ...]
    logins: tuple[tuple[str, int, float], ...]


class Failures:
    """Counts wrong tokens by address over the last five minutes. A right one always passes: who
    shares an address with a badly set-up box is not locked out."""

    def __init__(self) -> None:
        self._times: dict[str, list[float]] = {}

    def add(self, address: str) -> int:
        """Count one more and return how many there were lately."""
        now = time.monotonic()
        recent = [t for t in self._times.pop(address, []) if now - t < FAILURE_SECONDS]
        self._times[address] = [*recent, now][-FAILURES - 1 :]
        if len(self._times) > ADDRESSES_KEPT:
            self._times.pop(next(iter(self._times)))
        return len(self._times[address])


class Auth:
    """Judges requests; one per server."""

    def __init__(self, settings: Settings, database: Database, workers: Workers) -> None:
        self._settings, self._database, self._workers = settings, database, workers
        self._known = _Known(0, True, (), ())
        self._used: dict[int, float] = {}
        self._failures = Failures()

    async def check(self, request: Request, scopes: tuple[str, ...]) -> None:
        """Let a request pass that has one of `scopes`.

        Raises:
            ApiError: 401 without a token that counts, 403 with one of other scopes, 429.
        """
        known = await self._read()
        if not self._settings.public and not known.any_made:
            return
        secret, cookie = _bearer(request), request.cookies.get(COOKIE)
        found = _find(known, secret, cookie)
        if found is None and (secret or cookie):
            found = _find(await self._read(anew=True), secret, cookie)  # made a moment ago?
        if found is None:
            raise self._refusal(request, secret)
        token, granted = found
        self._note_use(token)
        if not granted.intersection(scopes):
            wanted = " or ".join(scopes)
            raise ApiError(403, f"this token has no scope {wanted}: it has {', '.join(granted)}")

    async def login(self, request: Request, token: str) -> str:
        """Return the cookie for a browser that gave a token.

        Raises:
            ApiError: 401, it does not count; 429.
        """
        found = _find(await self._read(anew=True), token, None)
        if found is None:
            raise self._refusal(request, token)
        secret = secrets.token_urlsafe(32)
        now = time.time()
        row = (hash_secret(secret), found[0], now, now + LOGIN_SECONDS)

        def job(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM login WHERE expires < ?", (now,))
            connection.execute("INSERT INTO login VALUES (?, ?, ?, ?)", row)

        await asyncio.wrap_future(self._database.write(job))
        await self._read(anew=True)
        return secret

    def _refusal(self, request: Request, secret: str | None) -> ApiError:
        headers = {"WWW-Authenticate": "Bearer"}
        if not secret:
            return ApiError(401, "a token is needed: set ENDLEX_TOKEN, or log in", headers)
        address = request.client.host if request.client else ""
        if self._failures.add(address) > FAILURES:
            wait = {"Retry-After": "60"}
            return ApiError(429, "too many wrong tokens from this address: wait a while", wait)
        message = "the token is not known, or revoked: make one with `endlex token create`"
        return ApiError(401, message, headers)

    async def logout(self, cookie: str) -> None:
        """Forget a browser's login."""
        digest = hash_secret(cookie)

        def job(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM login WHERE hash=?", (digest,))

        await asyncio.wrap_future(self._database.write(job))
        await self._read(anew=True)

    async def _read(self, anew: bool = False) -> _Known:
        if anew or time.monotonic() - self._known.read > KNOWN_FOR_SECONDS:
            self._known = await self._workers.quick(_read_known, self._database)
        return self._known

    def _note_use(self, token: int) -> None:
        now = time.time()
        if now - self._used.get(token, 0) > LAST_USED_EVERY:
            self._used[token] = now
            self._database.write(
                lambda c: (
                    c.execute("UPDATE token SET last_used=? WHERE pk=?", (now, token)).rowcount
                )
            )


def _read_known(database: Database) -> _Known:
    read = time.monotonic()
    with database.snapshot() as connection:
        rows = connection.execute("SELECT hash, pk, scopes, revoked FROM token").fetchall()
        logins = connection.execute(
            "SELECT hash, token, expires FROM login WHERE expires > ?", (time.time(),)
        ).fetchall()
    tokens = tuple((h, pk, frozenset(s.split(","))) for h, pk, s, revoked in rows if not revoked)
    return _Known(read, bool(rows), tokens, tuple(logins))


def _find(
    known: _Known, secret: str | None, cookie: str | None
) -> tuple[int, frozenset[str]] | None:
    """Return the token that a request carries; every stored hash is compared, in constant time."""
    found: tuple[int, frozenset[str]] | None = None
    if secret:
        digest = hash_secret(secret)
        for stored, pk, scopes in known.tokens:
            if hmac.compare_digest(stored, digest):
                found = (pk, scopes)
        return found
    if cookie:
        digest = hash_secret(cookie)
        owner = None
        for stored, token, expires in known.logins:
            if hmac.compare_digest(stored, digest) and expires > time.time():
                owner = token
        for _, pk, scopes in known.tokens:
            if pk == owner:
                found = (pk, scopes)
    return found


def _bearer(request: Request) -> str | None:
    kind, _, secret = request.headers.get("authorization", "").partition(" ")
    return secret.strip() if kind.lower() == "bearer" and secret.strip() else None


def require(*scopes: Scope) -> Callable[[Request], Awaitable[None]]:
    """Return the dependency of a route that any one of `scopes` opens."""

    async def check(request: Request) -> None:
        await request.app.state.server.auth.check(request, scopes)

    return check
