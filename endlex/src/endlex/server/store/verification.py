"""Verify the files of checkpoints in a background thread, and publish those that are whole.

A checkpoint's state is in the database: what was being verified when the server ended is verified
from the beginning when it starts again.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import sqlite3
import threading
from concurrent.futures import Future
from dataclasses import dataclass

import orjson

from endlex.protocol import REMOVED, EndlexError, Manifest, ManifestFile
from endlex.server.events import Hub
from endlex.server.store.blobs import Blobs, open_part
from endlex.server.store.database import Database
from endlex.server.store.retention import remove_replaced

logger = logging.getLogger("endlex")


@dataclass(frozen=True)
class Outcome:
    """What a verification found."""

    state: str
    error: str | None = None


class _Stopped(Exception):
    """The server is ending."""


class Verifier:
    """The thread that hashes what was accepted, one checkpoint after the other."""

    def __init__(self, database: Database, blobs: Blobs, hub: Hub) -> None:
        self._database, self._blobs, self._hub = database, blobs, hub
        self._waiting: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._progress: dict[int, int] = {}
        self._done: dict[int, Future[None]] = {}
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="endlex-verify", daemon=True)

    def start(self) -> None:
        """Begin to verify, with what was left over from the last time."""
        rows = self._database.reader().execute("SELECT pk FROM checkpoint WHERE state='verifying'")
        for (pk,) in rows.fetchall():
            self.enqueue(pk)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it was verifying stays `verifying`."""
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()

    def enqueue(self, pk: int) -> Future[None]:
        """Have the checkpoint with this key verified; what is returned ends when it is."""
        with self._lock:
            if pk not in self._done:
                self._done[pk] = Future()
                self._waiting.put(pk)
            return self._done[pk]

    def hashed_bytes(self, pk: int) -> int:
        """How much of a checkpoint that is being verified has been read."""
        return self._progress.get(pk, 0)

    def _work(self) -> None:
        while not self._stopping.is_set():
            pk = self._waiting.get()
            if pk is None:
                return
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
                    self._done.pop(pk).set_result(None)

    def _verify(self, pk: int) -> bool:
        """Verify a checkpoint and store the outcome; False when its manifest is another by then."""
        row = (
            self._database.reader()
            .execute(
                "SELECT manifest, run.id, checkpoint.name FROM checkpoint "
                "JOIN run ON run.pk = checkpoint.run "
                "WHERE checkpoint.pk=? AND state='verifying'",
                (pk,),
            )
            .fetchone()
        )
        if row is None:  # deleted meanwhile, or done
            return True
        text, run, name = row
        self._progress[pk] = 0
        outcome = self._judge(pk, orjson.loads(text))

        def finish(connection: sqlite3.Connection) -> list[str] | None:
            changed = connection.execute(
                "UPDATE checkpoint SET state=?, error=? WHERE pk=? AND state='verifying' "
                "AND manifest=?",
                (outcome.state, outcome.error, pk, text),
            )
            if changed.rowcount != 1:
                return None
            return remove_replaced(connection, pk) if outcome.state == "published" else []

        replaced = self._database.write(finish).result()
        if replaced is None:
            return False
        for other, state in [(name, outcome.state), *((gone, REMOVED) for gone in replaced)]:
            self._hub.publish("checkpoint", {"run": run, "name": other, "state": state})
        return True

    def _judge(self, pk: int, manifest: Manifest) -> Outcome:
        for file in manifest["files"]:
            digest = hashlib.sha256()
            for part in file["parts"]:
                try:
                    with open_part(self._blobs, part["sha256"]) as pieces:
                        for piece in pieces:
                            digest.update(piece)
                            self._progress[pk] += len(piece)
                            if self._stopping.is_set():
                                raise _Stopped
                except FileNotFoundError:
                    return Outcome("incomplete", f"part {part['sha256']} is gone: send it again")
            if digest.hexdigest() != file["sha256"]:
                return self._blame(file, digest.hexdigest())
        return Outcome("published")

    def _blame(self, file: ManifestFile, found: str) -> Outcome:
        """Find out whether the manifest is wrong, or a part that decayed on this disk."""
        decayed = []
        for part in file["parts"]:
            with self._blobs.path(part["sha256"]).open("rb") as stored:
                if hashlib.file_digest(stored, "sha256").hexdigest() != part["sha256"]:
                    decayed.append(part["sha256"])
        if decayed:
            with self._blobs.lock:
                for sha256 in decayed:
                    self._blobs.delete(sha256)
            message = f"{len(decayed)} parts were damaged on the server's disk: send them again"
            return Outcome("incomplete", message)
        message = f"{file['path']!r} has SHA-256 {found}, and the manifest says {file['sha256']}"
        return Outcome("failed", message)
