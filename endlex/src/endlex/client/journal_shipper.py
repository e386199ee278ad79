"""All journals of one run's directory on their way, and the word how each session is.

`tick` looks at every file once and sends what is new. A network fault ends it with a `Retry`, for
the caller to wait; what the server refuses concerns one session, which is tried again rarely, while
the others go on.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from endlex.client.journal import (
    end_status,
    gone_status,
    session_files,
    session_kind,
    writer_is_alive,
)
from endlex.client.session_sync import BATCH_BYTES, SessionSync
from endlex.client.transport import Refused, Retry, Transport, Unreachable
from endlex.protocol import SYSTEM, EndlexError

HEARTBEAT_SECONDS = 20.0
REFUSED_SECONDS = 30.0


@dataclass
class Session:
    """One journal and how far it is."""

    sync: SessionSync
    kind: str
    settled_size: int = -1
    """Of the file when nothing whole was left to send."""
    alive: bool = True
    done: bool = False
    """Everything acknowledged, the writer gone, and the server told how it ended."""
    error: str | None = None
    retry_at: float = 0.0
    beat_at: float = 0.0


class JournalShipper:
    """Ship the journals of a run's directory; new sessions are found as they appear.

    Args:
        reported: sessions of whose end this server was told before.
    """

    def __init__(
        self,
        directory: Path,
        run: str,
        transport: Transport,
        *,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        refused_seconds: float = REFUSED_SECONDS,
        reported: Collection[str] = (),
    ) -> None:
        self._directory, self._run, self._transport = directory, run, transport
        self._heartbeat, self._patience = heartbeat_seconds, refused_seconds
        self._reported = set(reported)
        self.sessions: dict[str, Session] = {}
        self.denied = False
        """Whether the last refusal was of the token."""

    def tick(self) -> bool:
        """Look at every session once; whether there is more to send right away.

        Raises:
            Retry: the server is not there, or says later.
        """
        self._find()
        more, later = False, None
        for session in self.sessions.values():
            if session.done or time.monotonic() < session.retry_at:
                continue
            try:
                more |= self._advance(session)
                session.error = None
            except Unreachable:
                raise
            except Retry as error:  # said of one session: the others go on
                later = error
            except (EndlexError, OSError) as error:
                self.denied = isinstance(error, Refused) and error.status in (401, 403)
                session.error = str(error)
                session.retry_at = time.monotonic() + self._patience
        if later is not None and not more:
            raise later
        return more

    def _find(self) -> None:
        for path in session_files(self._directory):
            if path.stem not in self.sessions:
                sync = SessionSync(self._run, path, self._transport)
                self.sessions[path.stem] = Session(sync, session_kind(path))

    def _advance(self, session: Session) -> bool:
        sync = session.sync
        size = sync.path.stat().st_size
        if size != session.settled_size or sync.acknowledged is None:
            sent = sync.ship()
            if sent:
                self._reported.discard(sync.session)
                self._beat(session, size)
                return sent >= BATCH_BYTES // 2
            session.settled_size = size
        session.alive = writer_is_alive(sync.path)
        if session.alive:
            self._beat(session, size)
        elif sync.path.stat().st_size == size:  # else it wrote once more before it went
            self._say_how_it_ended(session)
        return False

    def _beat(self, session: Session, size: int) -> None:
        now = time.monotonic()
        acknowledged = session.sync.acknowledged
        if acknowledged and now >= session.beat_at:
            session.sync.report("running", max(size - acknowledged, 0))
            session.beat_at = now + self._heartbeat

    def _say_how_it_ended(self, session: Session) -> None:
        if session.sync.acknowledged and session.sync.session not in self._reported:
            path = session.sync.path
            session.sync.report(end_status(path) or gone_status(path), 0)
        session.done = True

    def states(self) -> dict[str, dict[str, Any]]:
        """By session: `acknowledged` bytes, whether it is `done`, and `error`."""
        return {
            name: {
                "acknowledged": session.sync.acknowledged or 0,
                "done": session.done,
                "error": session.error,
            }
            for name, session in self.sessions.items()
        }

    def has_live_trainer(self) -> bool:
        """Whether a process other than a shipper still writes here, as of the last tick."""
        return any(s.kind != SYSTEM and s.alive and not s.done for s in self.sessions.values())

    def all_found(self) -> bool:
        """Whether no session began since the last tick."""
        return {path.stem for path in session_files(self._directory)} <= set(self.sessions)
