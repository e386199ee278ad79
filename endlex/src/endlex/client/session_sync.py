"""One session's journal on its way: from the offset that the server has acknowledged, in batches.

The server is asked once how much it has, with the hash of it: nothing is added to another content
under the same id. Then each batch is whole lines from that offset on, with a checksum; the answer
is the next offset. A batch sent twice does no harm, so after any fault the same is simply done
again.
"""

from __future__ import annotations

import hashlib
import zlib
from pathlib import Path

from endlex.client.journal import content_length
from endlex.client.run_directory import write_whole
from endlex.client.transport import Answer, Refused, Retry, Transport, quoted
from endlex.protocol import MAX_BATCH_BYTES, EndlexError

BATCH_BYTES = 2**20
DEFLATE_LEVEL = 6


class SessionDiffers(EndlexError):
    """The server has another content under the session's id."""


class SessionSync:
    """How far one journal is on the server.

    Args:
        path: of the journal; its stem is the session.
    """

    def __init__(self, run: str, path: Path, transport: Transport) -> None:
        self.path, self.session = path, path.stem
        self._transport = transport
        self._where = quoted("runs", run, "sessions", self.session)
        self.acknowledged: int | None = None
        """Bytes that the server has; None until it was asked."""

    def ask(self) -> int:
        """Ask the server how much it has, and compare that with the journal by hash.

        Raises:
            SessionDiffers: what both have is not the same.
            TransportError: it does not say.
        """
        length = content_length(self.path)
        try:
            query = {"upto": length}
            answer = self._transport.request("GET", f"{self._where}/journal", query=query)
            offset, theirs = int(answer.content["offset"]), answer.content["sha256"]
        except Refused as error:
            if error.status != 404:
                raise
            offset, theirs = 0, None
        except (KeyError, TypeError, ValueError) as error:
            raise self._transport.ill_answer() from error
        if offset and _digest(self.path, min(offset, length)) != theirs:
            raise SessionDiffers(
                f"the server's copy of session {self.session} differs from {self.path}: to keep "
                "both, send the file as a new session with `endlex sync --resend DIR`"
            )
        self.acknowledged = offset
        return offset

    def ship(self) -> int:
        """Send the next batch, and return its bytes: 0 if there is nothing to send.

        Raises:
            TransportError: it did not arrive; `acknowledged` is right all the same.
            EndlexError: the journal has a line that no server takes.
            OSError: the journal cannot be read.
        """
        start = self.ask() if self.acknowledged is None else self.acknowledged
        batch = read_batch(self.path, start, BATCH_BYTES)
        if not batch:
            return 0
        try:
            answer = self._post(batch, start)
            offset = int(answer.content["offset"])
        except Refused as error:
            if error.status == 409:
                self.acknowledged = None  # it has another offset in mind: ask, and go on from it
                raise Retry(str(error)) from error
            if error.status == 400:  # damaged on the way
                raise Retry(str(error)) from error
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise self._transport.ill_answer() from error
        if offset <= start:
            raise Retry(f"{self._transport.url} took nothing of session {self.session}")
        self.acknowledged = offset
        return len(batch)

    def _post(self, batch: bytes, offset: int) -> Answer:
        query = {"offset": offset, "crc": f"{zlib.crc32(batch):08x}"}
        headers = {"Content-Type": "application/x-ndjson"}
        if not self._transport.is_local:
            batch = zlib.compress(batch, DEFLATE_LEVEL)
            headers["Content-Encoding"] = "deflate"
        return self._transport.request(
            "POST", f"{self._where}/journal", query=query, body=batch, headers=headers
        )

    def report(self, status: str, unsent_bytes: int) -> None:
        """Tell the server how the session is: `running`, or how it ended.

        Raises:
            TransportError: it did not arrive.
        """
        body = {"status": status, "unsent_bytes": unsent_bytes}
        self._transport.request("POST", f"{self._where}/state", json_body=body)

    def missing_bytes(self) -> int:
        """Compare both sides by hash, and return how many bytes the server lacks.

        Where this side lost its last lines (power failed after they were sent), nothing is
        missing as long as the rest is equal.

        Raises:
            SessionDiffers: the two differ.
            TransportError: the server does not say.
        """
        return max(content_length(self.path) - self.ask(), 0)


def renew_session(path: Path) -> Path:
    """Give a journal that nobody writes another session id, made from its content.

    What a server has under the old id stays there.
    """
    content = path.read_bytes()
    number = path.stem.partition("-")[0]
    session = f"{number}-{hashlib.sha256(content).hexdigest()[:12]}"
    renewed = path.with_name(f"{session}.jsonl")
    write_whole(renewed, content.replace(path.stem.encode(), session.encode()))
    path.unlink()
    return renewed


def read_batch(path: Path, start: int, size: int) -> bytes:
    """Whole lines from `start` on: as many as fit, but at least one if there is one.

    Raises:
        EndlexError: a line is longer than any server takes.
    """
    with path.open("rb") as file:
        file.seek(start)
        batch = file.read(size)
        end = batch.rfind(b"\n") + 1
        if not end and len(batch) == size:
            batch += file.read(MAX_BATCH_BYTES - size)
            end = batch.find(b"\n", size) + 1
            if not end and len(batch) == MAX_BATCH_BYTES:
                raise EndlexError(
                    f"{path} has a line of more than {MAX_BATCH_BYTES:,} bytes from byte {start} "
                    "on: the file was altered"
                )
    return batch[:end]


def _digest(path: Path, length: int) -> str:
    """SHA-256 of a file's first bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length and (block := file.read(min(length, 2**20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()
