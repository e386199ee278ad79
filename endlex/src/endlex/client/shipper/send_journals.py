"""Send journals: from the offset that the server has acknowledged, in batches.

The server is asked once how much it has of a session, with the hash of it. Then each batch is whole
lines from that offset on, with a checksum; the answer is the next offset. A batch sent twice does
no harm, so after any fault the same is simply done again. A network fault ends a look at all
sessions with a `Retry`; what the server refuses concerns one session, which is tried again rarely.
"""

from __future__ import annotations

import hashlib
import time
import zlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

from endlex import reading
from endlex.client.process import oom_kills, write_whole
from endlex.client.transport import REFUSED_SECONDS, Refused, Retry, Transport, Unreachable, quoted
from endlex.protocol import CRASHED, MAX_BATCH_BYTES, SYSTEM, EndlexError
from endlex.reading import content_length, session_files, session_kind, writer_is_alive

BATCH_BYTES = 2**20
HEARTBEAT_SECONDS = 20.0


class SessionDiffers(EndlexError):
    """The server has another content under the session's id."""


class SessionShipper:
    """Send one journal, whose path's stem is the session."""

    def __init__(self, run: str, path: Path, transport: Transport) -> None:
        self.path, self.session, self.kind = path, path.stem, session_kind(path)
        self._transport = transport
        self._where = quoted("runs", run, "sessions", self.session)
        self.acknowledged: int | None = None  # bytes that the server has; None until it was asked
        self.alive, self.done = True, False
        """Whether a process still writes it; whether all of it is sent, its end included."""
        self.error: str | None = None
        self.retry_at = self.beat_at = 0.0

    def ask(self) -> int:
        """Ask the server how much it has; another content there raises `SessionDiffers`."""
        length = content_length(self.path)
        where, query = f"{self._where}/journal", {"upto": length}
        try:
            content = self._transport.request("GET", where, query=query).content
            offset, theirs = int(content["offset"]), content["sha256"]
        except Refused as error:
            if error.status != 404:
                raise
            offset, theirs = 0, None
        except (KeyError, TypeError, ValueError) as error:
            raise self._transport.ill_answer() from error
        if offset and _digest(self.path, min(offset, length)) != theirs:
            remedy = "to keep both, send the file as a new session with `endlex sync --resend DIR`"
            copy = f"the server's copy of session {self.session}"
            raise SessionDiffers(f"{copy} differs from {self.path}: {remedy}")
        self.acknowledged = offset
        return offset

    def ship(self) -> int:
        """Send the next batch, and return its bytes: 0 if there is nothing to send.

        If it did not arrive (`TransportError`), `acknowledged` is right all the same.
        """
        start = self.ask() if self.acknowledged is None else self.acknowledged
        if not (batch := read_batch(self.path, start, BATCH_BYTES)):
            return 0
        query = {"offset": start, "crc": f"{zlib.crc32(batch):08x}"}
        headers, body = {"Content-Type": "application/x-ndjson"}, batch
        if not self._transport.is_local:
            body = zlib.compress(batch)
            headers["Content-Encoding"] = "deflate"
        try:
            answer = self._transport.request(
                "POST", f"{self._where}/journal", query=query, body=body, headers=headers
            )
            offset = int(answer.content["offset"])
        except Refused as error:
            if error.status not in (400, 409):
                raise
            if error.status == 409:  # it expects another offset: ask, and continue from there
                self.acknowledged = None
            raise Retry(str(error)) from error  # or it was damaged on the way
        except (KeyError, TypeError, ValueError) as error:
            raise self._transport.ill_answer() from error
        if offset <= start:
            raise Retry(f"{self._transport.url} took nothing of session {self.session}")
        self.acknowledged = offset
        return len(batch)

    def report(self, status: str, unsent_bytes: int, reason: str | None = None) -> None:
        """Tell the server how the session is: `running`, or how it ended, and why."""
        body = {"status": status, "unsent_bytes": unsent_bytes, "reason": reason}
        self._transport.request("POST", f"{self._where}/state", json_body=body)

    def missing_bytes(self) -> int:
        """Compare both sides by hash, and return how many bytes the server lacks.

        Nothing is missing where this side lost lines (power failed) after they were sent.
        """
        return max(content_length(self.path) - self.ask(), 0)


def renew_session(path: Path) -> Path:
    """Give a journal that nobody writes another session id, made from its content."""
    content = path.read_bytes()
    session = f"{path.stem.partition('-')[0]}-{hashlib.sha256(content).hexdigest()[:12]}"
    renewed = path.with_name(f"{session}.jsonl")
    write_whole(renewed, content.replace(path.stem.encode(), session.encode()))
    path.unlink()
    return renewed


def read_batch(path: Path, start: int, size: int) -> bytes:
    """Return whole lines from `start` on: as many as fit, but at least one if there is one."""
    with path.open("rb") as file:
        file.seek(start)
        batch = file.read(size)
        end = batch.rfind(b"\n") + 1
        if end or len(batch) < size:
            return batch[:end]
        batch += file.readline(MAX_BATCH_BYTES - size)
    if batch.endswith(b"\n"):
        return batch
    if len(batch) < MAX_BATCH_BYTES:
        return b""
    large = f"a line of more than {MAX_BATCH_BYTES:,} bytes from byte {start} on"
    raise EndlexError(f"{path} has {large}: the file was altered")


def _digest(path: Path, length: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while length and (block := file.read(min(length, 2**20))):
            digest.update(block)
            length -= len(block)
    return digest.hexdigest()


class JournalShipper:
    """Ship the journals of a run's directory; new sessions are found as they appear.

    The server knows already how the `reported` sessions ended.
    """

    def __init__(
        self, directory: Path, run: str, transport: Transport, reported: Collection[str] = ()
    ) -> None:
        self._directory, self._run, self._transport = directory, run, transport
        self._reported = set(reported)
        self._oom_kills = oom_kills()
        self.sessions: dict[str, SessionShipper] = {}
        self.denied = False  # whether the last refusal was of the token

    def renew_differing(self) -> None:
        """Give journals that differ from the server's copies another session id."""
        for path in session_files(self._directory):
            try:
                SessionShipper(self._run, path, self._transport).ask()
            except SessionDiffers:
                if not writer_is_alive(path):
                    renew_session(path)

    def tick(self) -> bool:
        """Look at each session, and return whether more can be sent now; or raise `Retry`."""
        for path in session_files(self._directory):
            if path.stem not in self.sessions:
                self.sessions[path.stem] = SessionShipper(self._run, path, self._transport)
        more, later = False, None
        for session in self.sessions.values():
            if session.done or time.monotonic() < session.retry_at:
                continue
            try:
                more |= self._advance(session)
                session.error = None
            except Unreachable:
                raise
            except Retry as error:  # one session must wait: the others continue
                later = error
            except (EndlexError, OSError) as error:
                self.denied = isinstance(error, Refused) and error.status in (401, 403)
                session.error = str(error)
                session.retry_at = time.monotonic() + REFUSED_SECONDS
        if later is not None and not more:
            raise later
        return more

    def _advance(self, session: SessionShipper) -> bool:
        size = session.path.stat().st_size
        is_settled = session.acknowledged is not None and size <= session.acknowledged
        if not is_settled and (sent := session.ship()):
            self._reported.discard(session.session)
            self._beat(session, size)
            return sent >= BATCH_BYTES // 2
        session.alive = writer_is_alive(session.path)
        if session.alive:
            self._beat(session, size)
        elif session.path.stat().st_size == size:  # else it wrote once more before it went
            self._report_end(session)
        return False

    def _beat(self, session: SessionShipper, size: int) -> None:
        now = time.monotonic()
        if session.acknowledged and now >= session.beat_at:
            session.report("running", max(size - session.acknowledged, 0))
            session.beat_at = now + HEARTBEAT_SECONDS

    def _report_end(self, session: SessionShipper) -> None:
        if session.acknowledged and session.session not in self._reported:
            status = reading.end_status(session.path) or reading.gone_status(session.path)
            reason = reading.gone_reason(session.path) if status == CRASHED else None
            if reason and oom_kills() > self._oom_kills:
                killed = "the kernel ended a process of this machine for lack of memory"
                reason = f"{killed}; {reason}"
            session.report(status, 0, reason)
        session.done = True

    def states(self) -> dict[str, dict[str, Any]]:
        """Return, by session, `acknowledged` bytes, whether it is `done`, and `error`."""
        return {
            name: {"acknowledged": one.acknowledged or 0, "done": one.done, "error": one.error}
            for name, one in self.sessions.items()
        }

    def errors(self) -> list[str]:
        """Return what keeps sessions from being sent."""
        return [session.error for session in self.sessions.values() if session.error]

    def has_live_trainer(self) -> bool:
        """Whether a process other than a shipper still writes here, as of the last tick."""
        return any(s.kind != SYSTEM and s.alive and not s.done for s in self.sessions.values())

    def all_done(self) -> bool:
        """Whether every session, those that began since the last tick too, is over and sent."""
        found = {path.stem for path in session_files(self._directory)}
        return found <= {name for name, session in self.sessions.items() if session.done}
