"""The journals as they came: compressed segments, their hash, their bytes.

What is kept here is byte for byte what the training box has, whatever it says; everything else in
the database can be made from it. Short segments grow, so that a run that logs once a second does
not leave a row for every second.
"""

from __future__ import annotations

import hashlib
import sqlite3
import zlib
from collections.abc import Iterator

SHORT_SEGMENT = 64 * 1024
"""Bytes, uncompressed, below which a segment takes what comes next."""
LEVEL = 1


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
        content = zlib.decompress(row[1])[start - row[0] : end - row[0]] if row else b""
        if not content:
            raise RuntimeError(f"the journal of session {session} ends at {start}, before {end}")
        yield content
        start += len(content)


def hash_journal(connection: sqlite3.Connection, session: int, end: int) -> str:
    """Return the SHA-256 of a journal's first `end` bytes, which must be there."""
    digest = hashlib.sha256()
    for content in iter_bytes(connection, session, 0, end):
        digest.update(content)
    return digest.hexdigest()
