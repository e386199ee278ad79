"""The journals as they came: compressed segments, their hash, their bytes.

What is kept here is byte for byte what the training box has, whatever it says; everything else in
the database can be made from it. Short segments grow, so that a run that logs once a second does
not leave a row for every second.
"""

from __future__ import annotations

import hashlib
import sqlite3
import threading
import zlib
from collections import OrderedDict
from collections.abc import Iterator

from endlex.server.store.database import Database

SHORT_SEGMENT = 64 * 1024
"""Bytes, uncompressed, below which a segment takes what comes next."""
LEVEL = 1
HASHES_KEPT = 256


def compress(body: bytes) -> bytes:
    """Return `body` as a segment holds it."""
    return zlib.compress(body, LEVEL)


def append_segment(
    connection: sqlite3.Connection, session: int, offset: int, body: bytes, data: bytes
) -> None:
    """Store `body` (compressed: `data`) behind the `offset` bytes that are there."""
    last = None
    if len(body) < SHORT_SEGMENT:
        last = connection.execute(
            "SELECT start, size, data FROM segment WHERE session=? ORDER BY start DESC LIMIT 1",
            (session,),
        ).fetchone()
    if last is not None and last[1] < SHORT_SEGMENT:
        start, size, before = last
        connection.execute(
            "UPDATE segment SET size=?, data=? WHERE session=? AND start=?",
            (size + len(body), compress(zlib.decompress(before) + body), session, start),
        )
    else:
        connection.execute(
            "INSERT INTO segment VALUES (?, ?, ?, ?)", (session, offset, len(body), data)
        )


def iter_bytes(
    connection: sqlite3.Connection, session: int, start: int, end: int
) -> Iterator[bytes]:
    """Yield the journal's bytes from `start` up to `end`, a segment at a time."""
    while start < end:
        row = connection.execute(
            "SELECT start, data FROM segment WHERE session=? AND start<=? "
            "ORDER BY start DESC LIMIT 1",
            (session, start),
        ).fetchone()
        if row is None:
            return
        content = zlib.decompress(row[1])[start - row[0] : end - row[0]]
        if not content:
            return
        yield content
        start += len(content)


class JournalHashes:
    """SHA-256 of journals' beginnings; one that grew is hashed on from where it was."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._lock = threading.Lock()
        self._known: OrderedDict[int, tuple[int, hashlib._Hash]] = OrderedDict()

    def hash(self, session: int, upto: int) -> str:
        """Return the hash of the first `upto` bytes, which must be there. Call it in a thread."""
        with self._lock:
            start, digest = self._known.get(session, (0, hashlib.sha256()))
            if start > upto:
                start, digest = 0, hashlib.sha256()
            digest = digest.copy()
        for content in iter_bytes(self._database.reader(), session, start, upto):
            digest.update(content)
        with self._lock:
            self._known[session] = (upto, digest)
            self._known.move_to_end(session)
            while len(self._known) > HASHES_KEPT:
                self._known.popitem(last=False)
        return digest.hexdigest()

    def forget(self, session: int) -> None:
        """Drop what is known of a session that was deleted."""
        with self._lock:
            self._known.pop(session, None)
