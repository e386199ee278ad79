"""Verify the files of checkpoints in a background thread, and publish those that are whole.

A checkpoint's state is in the database: what was being verified when the server ended is verified
from the beginning when it starts again.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import orjson

from endlex.protocol import REMOVED, EndlexError, Manifest, ManifestFile
from endlex.server.events import Hub
from endlex.server.store.blobs import Blobs
from endlex.server.store.database import Database
from endlex.server.store.retention import remove_replaced

logger = logging.getLogger("endlex")

Outcome = tuple[str, str | None]
"""The state that a checkpoint has after its verification, and what is wrong with it."""


class _Stopped(Exception):
    """The server is ending."""


class Verifier:
    """The thread that hashes what was accepted, one checkpoint after the other."""

    def __init__(self, database: Database, blobs: Blobs, hub: Hub) -> None:
        self._database, self._blobs, self._hub = database, blobs, hub
        self._pool = ThreadPoolExecutor(1, "endlex-verify")
        self._progress: dict[int, int] = {}
        self._running: dict[int, Future[None]] = {}
        self._stopping = False
        self._lock = threading.Lock()
        rows = database.reader().execute("SELECT pk FROM checkpoint WHERE state='verifying'")
        for (pk,) in rows.fetchall():  # left over from the last time
            self.enqueue(pk)

    def stop(self) -> None:
        """End the thread; what it was verifying stays `verifying`."""
        with self._lock:
            self._stopping = True
        self._pool.shutdown(cancel_futures=True)

    def enqueue(self, pk: int) -> Future[None]:
        """Have the checkpoint with this key verified; the future resolves when that is done."""
        with self._lock:
            if self._stopping:
                return Future()
            if pk not in self._running:
                self._running[pk] = self._pool.submit(self._work, pk)
            return self._running[pk]

    def hashed_bytes(self, pk: int) -> int:
        """How much of a checkpoint that is being verified has been read."""
        return self._progress.get(pk, 0)

    def _work(self, pk: int) -> None:
        try:
            while not self._verify(pk):
                logger.info("checkpoint %d was replaced while it was verified", pk)
        except _Stopped:
            return
        except (OSError, sqlite3.Error, EndlexError) as error:
            logger.error("cannot verify checkpoint %d: %s; a new PUT tries again", pk, error)
        finally:
            with self._lock:
                self._progress.pop(pk, None)
                del self._running[pk]

    def _verify(self, pk: int) -> bool:
        """Verify a checkpoint and store the outcome; False if its manifest changed meanwhile."""
        query = (
            "SELECT manifest, run.id, checkpoint.name FROM checkpoint "
            "JOIN run ON run.pk = checkpoint.run WHERE checkpoint.pk=? AND state='verifying'"
        )
        row = self._database.reader().execute(query, (pk,)).fetchone()
        if row is None:  # deleted meanwhile, or done
            return True
        text, run, name = row
        self._progress[pk] = 0
        state, error = self._judge(pk, orjson.loads(text))

        def finish(connection: sqlite3.Connection) -> list[str] | None:
            changed = connection.execute(
                "UPDATE checkpoint SET state=?, error=? WHERE pk=? AND state='verifying' "
                "AND manifest=?",
                (state, error, pk, text),
            )
            if changed.rowcount != 1:
                return None
            return remove_replaced(connection, pk) if state == "published" else []

        replaced = self._database.write(finish).result()
        if replaced is None:
            return False
        for other, now in [(name, state), *((gone, REMOVED) for gone in replaced)]:
            self._hub.publish("checkpoint", {"run": run, "name": other, "state": now})
        return True

    def _judge(self, pk: int, manifest: Manifest) -> Outcome:
        for file in manifest["files"]:
            digest = hashlib.sha256()
            for part in file["parts"]:
                try:
                    for piece in self._blobs.iter_part(part["sha256"]):
                        digest.update(piece)
                        self._progress[pk] += len(piece)
                        if self._stopping:
                            raise _Stopped
                except FileNotFoundError:
                    return "incomplete", f"part {part['sha256']} is gone: send it again"
            if digest.hexdigest() != file["sha256"]:
                return self._blame(file, digest.hexdigest())
        return "published", None

    def _blame(self, file: ManifestFile, found: str) -> Outcome:
        """Find out whether the manifest is wrong, or a part that decayed on this disk."""
        decayed = 0
        for part in file["parts"]:
            path = self._blobs.path(part["sha256"])
            with self._blobs.lock, path.open("rb") as stored:
                if hashlib.file_digest(stored, "sha256").hexdigest() != part["sha256"]:
                    path.unlink()
                    decayed += 1
        if decayed:
            return "incomplete", (
                f"{decayed} parts were damaged on the server's disk: send them again"
            )
        message = f"{file['path']!r} has SHA-256 {found}, and the manifest says {file['sha256']}"
        return "failed", message
