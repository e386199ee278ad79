"""HTTP to the server, with the standard library: connections kept alive, with bounded waits.

A fault is one of two kinds: `Retry` (no answer, or one that says later) is tried again with a
growing wait (`Backoff`), and `Refused` will not be cured by asking again soon. No message holds the
token.
"""

from __future__ import annotations

import base64
import http.client
import itertools
import json
import random
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlencode, urlsplit

from endlex.protocol import EndlexError

CONNECT_SECONDS = 5.0
READ_SECONDS = 60.0
SEND_BYTES = 256 * 1024  # of a body, at a time: the wait is bounded for each, not for the whole
LARGEST_ANSWER = 64 * 2**20
HINTS = {  # remedies, by a part of the system's message
    "Connection refused": "is `endlex serve` running there?",
    "signed certificate": "the server's certificate is self-signed, or signed by an authority of "
    "your own: set SSL_CERT_FILE to its file",
    "unable to get local issuer": "this machine does not know who signed the certificate: set "
    "SSL_CERT_FILE to that authority's file",
    "mismatch": "the server's certificate is for another name",
    "has expired": "the server's certificate has expired, or this machine's clock is wrong",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: is the address http:// instead of https://?",
    "Tunnel connection failed": "that is the proxy's answer: see HTTPS_PROXY",
    "not known": "is the name right, and is there a network? Behind a proxy, set HTTPS_PROXY",
    "name resolution": "is there a network? Behind a proxy, set HTTPS_PROXY",
    "no answer in time": "behind a proxy, set HTTPS_PROXY",
}
REFUSED_SECONDS = 30.0  # seconds until something that the server refused is tried again

Body = bytes | memoryview | None


class TransportError(EndlexError):
    """The server did not do what it was asked."""


class Retry(TransportError):
    """Not now: ask again later, in `retry_after` seconds if the server said so."""

    def __init__(self, message: str, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Unreachable(Retry):
    """Nobody answered, or the answer was cut."""


class Refused(TransportError):
    """The server will not do it; `content` is the answer's JSON object, empty if it had none."""

    def __init__(self, message: str, status: int, content: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.status, self.content = status, dict(content)


class Answer(NamedTuple):
    """A request that went well."""

    content: Any  # decoded from JSON; None if there was none
    date: str | None = None  # when the server sent it, as it says


class _Local(threading.local):
    connection: http.client.HTTPConnection | None = None  # a thread's, if one is open


class Transport:
    """A connection to a server for each thread that asks, through HTTPS_PROXY or HTTP_PROXY if set.

    Certificates are checked against the system's, or those of SSL_CERT_FILE. The URL has the path
    under which the server lives, if any. A URL or token that is not one raises an `EndlexError`.
    """

    def __init__(self, url: str, token: str | None = None) -> None:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username:
            shown = url.rpartition("@")[2]
            raise EndlexError(f"the server's URL {shown!r} must look like https://host[:port]")
        if token is not None and not _is_token(token):
            raise EndlexError("the token holds characters that no token has: copy it again")
        self.host, self._secure = parts.hostname, parts.scheme == "https"
        try:
            self.port = parts.port or (443 if self._secure else 80)
        except ValueError as error:
            raise EndlexError(f"the server's URL {url!r} has no valid port") from error
        self._prefix, self._token = parts.path.rstrip("/"), token
        self.url = f"{parts.scheme}://{parts.netloc}{self._prefix}"
        self._local = _Local()
        self._way, self._proxy_headers = "", dict[str, str]()
        """In front of a request's path, and its headers, for a proxy that is asked for http."""

    @property
    def is_local(self) -> bool:
        """Whether the server is on this machine, so that compressing would only cost time."""
        return self.host in ("localhost", "::1") or self.host.startswith("127.")

    def renew_token(self, token: str | None) -> None:
        """Use another token from the next request on."""
        if token is not None and _is_token(token):
            self._token = token

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        json_body: Any = None,
        body: Body = None,
        headers: Mapping[str, str] | None = None,
    ) -> Answer:
        """Ask, and return the answer; `json_body` is sent in place of `body`.

        Args:
            path: below `/api/v1`, its parts quoted (`quoted`); `/health` is at the top.

        Raises:
            Retry: no answer, or a 5xx, 408, 425 or 429.
            Refused: any other status than 2xx.
        """
        given = dict(headers or {})
        if json_body is not None:
            body = json.dumps(json_body, allow_nan=False).encode()
            given["Content-Type"] = "application/json"
        target = f"{path}?{urlencode(query, doseq=True)}" if query else path
        return self._judge(self._open(method, target, body, given), f"{method} {path}")

    @contextmanager
    def download(
        self, path: str, *, start: int = 0, end: int | None = None
    ) -> Iterator[Iterator[bytes]]:
        """Ask for bytes `start` to `end` (excluded) of a file; the blocks are yielded as they come.

        It raises what `request` does, and `Refused` for a 200 where a range was asked for.
        """
        is_range = bool(start) or end is not None
        headers = {"Range": f"bytes={start}-{'' if end is None else end - 1}"} if is_range else {}
        response = self._open("GET", path, None, headers)
        try:
            if response.status != 206 and (is_range or response.status != 200):
                self._judge(response, f"GET {path}")
                raise Refused(f"{self.url} sent no part of {path}", response.status, {})
            yield self._blocks(response)
        finally:
            if not response.isclosed():
                self.close()

    def _blocks(self, response: http.client.HTTPResponse) -> Iterator[bytes]:
        try:
            while block := response.read(SEND_BYTES):
                yield block
            if response.length:  # read() does not say that the body ended too early
                raise http.client.IncompleteRead(b"", response.length)
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise self._unreachable(error) from error

    def _judge(self, response: http.client.HTTPResponse, asked: str) -> Answer:
        """Read a response, and return its answer or raise what its status means."""
        content = b"".join(itertools.islice(self._blocks(response), LARGEST_ANSWER // SEND_BYTES))
        if response.will_close or not response.isclosed():
            self.close()
        decoded, status = None, response.status
        with suppress(ValueError):  # also where there is none
            decoded = json.loads(content)
        if 200 <= status < 300:
            return Answer(decoded, response.getheader("Date"))
        said = decoded if isinstance(decoded, dict) else {}
        reason = str(said.get("error") or response.reason or "")[:500]
        message = f"{self.url} answered {asked} with {status}: {reason}"
        if status >= 500 or status in (408, 425, 429):
            after = (response.getheader("Retry-After") or "").strip()  # a date is ignored
            raise Retry(message, float(min(int(after), 300)) if after.isdecimal() else None)
        if status == 401:
            message += "; set ENDLEX_TOKEN, or put a token into ~/.config/endlex/token"
        if 300 <= status < 400:
            message += f" (it points to {response.getheader('Location')!r}: set ENDLEX_URL to that)"
        raise Refused(message, status, said)

    def _open(
        self, method: str, path: str, body: Body, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        """Ask, and return the response with its head read."""
        target = self._prefix + (path if path == "/health" else f"/api/v1{path}")
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if body is not None:
            headers["Content-Length"] = str(len(body))
        reused = self._local.connection is not None
        try:
            return self._send(method, target, body, headers)
        except BaseException as error:
            self.close()
            if reused and isinstance(error, ConnectionError):  # the server closed it while it idled
                return self._open(method, path, body, headers)
            if isinstance(error, OSError | http.client.HTTPException | UnicodeError):
                raise self._unreachable(error) from error
            raise

    def _send(
        self, method: str, target: str, body: Body, headers: dict[str, str]
    ) -> http.client.HTTPResponse:
        connection = self._local.connection
        if connection is None:
            connection = self._local.connection = self._new_connection()
            connection.connect()
            connection.sock.settimeout(READ_SECONDS)
        try:
            view = memoryview(body or b"")
            starts = range(0, len(view), SEND_BYTES)
            blocks = None if body is None else (view[at : at + SEND_BYTES] for at in starts)
            given = headers | self._proxy_headers
            connection.request(method, self._way + target, body=blocks, headers=given)
        except (BrokenPipeError, ConnectionResetError):
            if body is None:
                raise
            # A server that refuses a body may answer before it has all of it: read why.
            response = connection.getresponse()
            response.will_close = True
            return response
        return connection.getresponse()

    def _new_connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        proxy = None if self.is_local else proxy_for(self.url)
        if proxy is None:
            return kind(self.host, self.port, timeout=CONNECT_SECONDS)
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        headers = {}
        if parts.username:
            secret = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            basic = base64.b64encode(secret.encode()).decode()
            headers = {"Proxy-Authorization": f"Basic {basic}"}
        connection = kind(parts.hostname or "", parts.port or 80, timeout=CONNECT_SECONDS)
        if self._secure:
            connection.set_tunnel(self.host, self.port, headers)
        else:
            self._way, self._proxy_headers = f"http://{self.host}:{self.port}", headers
        return connection

    def _unreachable(self, error: Exception) -> Unreachable:
        reason = "no answer in time" if isinstance(error, TimeoutError) else str(error)
        hint = next((hint for sign, hint in HINTS.items() if sign in reason), None)
        hint = f" ({hint})" if hint and not (self.is_local and "proxy" in hint) else ""
        return Unreachable(f"cannot reach {self.url}: {reason or type(error).__name__}{hint}")

    def ill_answer(self) -> Retry:
        """Return the error for an answer that no Endlex server gives."""
        return Retry(f"{self.url} does not answer like an Endlex server")

    def close(self) -> None:
        """Close this thread's connection; its next request opens another one."""
        if self._local.connection is not None:
            with suppress(OSError):
                self._local.connection.close()
            self._local.connection = None


def proxy_for(url: str) -> str | None:
    """Return the proxy that the environment names for an address, if any."""
    from urllib.request import getproxies, proxy_bypass

    parts, proxies = urlsplit(url), getproxies()
    if proxy_bypass(parts.netloc):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def _is_token(token: str) -> bool:
    return token.isascii() and token.isprintable() and " " not in token and token != ""


def quoted(*parts: str) -> str:
    """Return a path of these parts, each quoted: `quoted("runs", run)` is `/runs/<run>`."""
    return "".join(f"/{quote(part, safe='')}" for part in parts)


class Backoff:
    """Waits that double from 0.2 s, each shortened at random by up to a half."""

    def __init__(self, longest: float = 30.0) -> None:
        self._longest = longest
        self.reset()

    def reset(self) -> None:
        """Start over: something worked."""
        self._next = 0.2

    def wait(self, error: Retry) -> float:
        """Return the seconds to wait now; at least those that the server asked for."""
        seconds = self._next * random.uniform(0.5, 1.0)
        self._next = min(2 * self._next, self._longest)
        return max(seconds, error.retry_after or 0.0)
