"""Ask a server, for a person who waits: one try, and what a fault means in words that help.

The shipper's own transport carries the requests. The token travels in a header only; no argument,
message or log holds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import IO, Any

from endlex.client.run_directory import server_token, server_url
from endlex.client.transport import Refused, Retry, Transport, Unreachable, quoted
from endlex.protocol import EndlexError

__all__ = ["Refused", "Server", "ServerUnreachable", "find_server", "find_transport", "run_path"]

HINTS = {
    "Connection refused": "is `endlex serve` running there?",
    "CERTIFICATE_VERIFY_FAILED": "its certificate is not valid for that name",
    "WRONG_VERSION_NUMBER": "it does not speak TLS: is the address http:// instead of https://?",
    "Name or service not known": "is the name right, and is there a network?",
}
NAME_HINT = "names are looked up with the scope read: give a run's id, or another token"
TOKEN_HINT = "set ENDLEX_TOKEN, or put a token into ~/.config/endlex/token"


class ServerUnreachable(EndlexError):
    """There is no answer: wrong address, no network, or no server."""


def find_transport(url: str | None) -> Transport:
    """Return a connection to the server named on the command line or in the environment.

    Raises:
        EndlexError: none was named, or the address or the token is not one.
    """
    named = url or server_url()
    if named is None:
        raise EndlexError("no server is known: give --url or set ENDLEX_URL (http://HOST:8817)")
    return Transport(named, server_token())


def find_server(url: str | None) -> Server:
    """Return the API of the server that was named; raises as `find_transport`."""
    return Server(find_transport(url))


class Server:
    """One server's API: JSON in and out, and downloads."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport

    @property
    def url(self) -> str:
        """Where it is."""
        return self.transport.url

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> Any:
        """Return what `GET path` answers; query values that are None are left out.

        Raises:
            ServerUnreachable: no answer.
            EndlexError: an error as the answer; a `Refused` where asking again is no use.
        """
        return self.send("GET", path, query=query)

    def send(
        self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None
    ) -> Any:
        """Send a request with a JSON body, and return what it answers; raises as `get`."""
        given = {name: value for name, value in (query or {}).items() if value is not None}
        try:
            answer = self.transport.request(method, path, query=given, json_body=body)
        except Retry as error:
            raise explain(error) from error
        except Refused as error:
            raise _with_hint(error) from error
        if answer.content is None:
            raise EndlexError(
                f"{self.url} does not answer as an Endlex server: what it sent for {path} is not "
                "JSON"
            )
        return answer.content

    def download(self, path: str, file: IO[bytes]) -> None:
        """Write what `GET path` answers to a file; raises as `get`."""
        try:
            with self.transport.download(path) as blocks:
                for block in blocks:
                    file.write(block)
        except Retry as error:
            raise explain(error) from error
        except Refused as error:
            raise _with_hint(error) from error


def explain(error: Retry) -> EndlexError:
    """Return the error of a request that got no answer, or one that says later, with a remedy."""
    hints = [hint for sign, hint in HINTS.items() if sign in str(error)]
    message = f"{error} ({hints[0]})" if hints else str(error)
    return ServerUnreachable(message) if isinstance(error, Unreachable) else EndlexError(message)


def _with_hint(error: Refused) -> Refused:
    if error.status not in (401, 403):
        return error
    hint = TOKEN_HINT if error.status == 401 else NAME_HINT if "scope read" in str(error) else ""
    return Refused(f"{error}{hint and '; '}{hint}", error.status, error.content)


def run_path(run: str, *rest: str) -> str:
    """Return the API's path of a run, or of something below it."""
    return quoted("runs", run, *rest)
