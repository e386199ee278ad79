"""Checkpoints: manifests that are accepted, verified in the background, and then published.

States: `announced` (only the journal speaks of it), `incomplete` (parts are missing), `verifying`,
`published`, `failed`, `removed` (published once; its manifest says what it was, and why it went).
Only a published one can be read. The state is in the database: what was
being verified when the server ended is verified from the beginning when it starts again.
"""

from __future__ import annotations

import hashlib
import logging
import queue
import sqlite3
import threading
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import orjson

from endlex.protocol import REMOVED, EndlexError, Manifest, ManifestFile, check_manifest
from endlex.server.blobs import Blobs, open_part
from endlex.server.database import Database
from endlex.server.errors import ApiError
from endlex.server.events import Hub
from endlex.server.queries import find_run

logger = logging.getLogger("endlex")

STATUS_OF_STATE = {"published": 200, "verifying": 202, "incomplete": 409, "failed": 422}


@dataclass(frozen=True)
class Outcome:
    """What a verification found."""

    state: str
    error: str | None = None


class _Stopped(Exception):
    """The server is ending."""


class Checkpoints:
    """The checkpoints of one server, and the thread that verifies them."""

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
            self._enqueue(pk)
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it was verifying stays `verifying`."""
        self._stopping.set()
        self._waiting.put(None)
        self._thread.join()

    def put(self, run: str, name: str, content: Any) -> Future[None] | None:
        """Accept a manifest; call it in a thread, and `describe` tells what became of it.

        Returns:
            What ends when it is verified, or None where that was done before.

        Raises:
            ApiError: 404, 409 or 422.
        """
        try:
            manifest = check_manifest(content)
        except EndlexError as error:
            raise ApiError(422, str(error), state="failed") from error
        if manifest["name"] != name:
            raise ApiError(422, f"the manifest is of {manifest['name']!r}, not of {name!r}")
        sizes = {p["sha256"]: p["bytes"] for file in manifest["files"] for p in file["parts"]}
        with self._blobs.lock:  # no part may go between this look and the commit
            missing, wrong = self._look(sizes)
            future = self._database.write(
                lambda c: _accept(c, run, manifest, sizes, bool(missing), wrong)
            )
            pk, state = future.result()
        if state == "incomplete":
            message = f"{len(missing)} parts of {name!r} are not here: send them, then this again"
            raise ApiError(409, message, state="incomplete", missing=missing)
        return self._enqueue(pk) if state == "verifying" else None

    def _look(self, sizes: dict[str, int]) -> tuple[list[str], str | None]:
        """Return the parts that are not here, and what is wrong with those that are."""
        missing: list[str] = []
        wrong: str | None = None
        for sha256, size in sizes.items():
            try:
                found = self._blobs.path(sha256).stat().st_size
            except FileNotFoundError:
                missing.append(sha256)
                continue
            if found != size:
                wrong = f"part {sha256} has {found:,} bytes, and the manifest says {size:,}"
        return missing, wrong

    def describe(self, run: str, name: str, *, whole: bool = True) -> dict[str, Any]:
        """Return a checkpoint's state and, if `whole`, its manifest's keys.

        Raises:
            ApiError: 404.
        """
        with self._database.snapshot() as connection:
            row = connection.execute(
                "SELECT pk, state, error, bytes, manifest, aliases, metadata, removed, reason "
                "FROM checkpoint "
                "WHERE run=? AND name=? AND manifest IS NOT NULL",
                (find_run(connection, run), name),
            ).fetchone()
        if row is None:
            raise ApiError(404, f"checkpoint {name[:120]!r} of run {run!r} is not here")
        pk, state, error, total, manifest, aliases, metadata, removed, reason = row
        answer: dict[str, Any] = {"state": state, "bytes": total}
        if state == REMOVED:
            answer |= {"removed": removed, "reason": reason}
        if error is not None:
            answer["error"] = error
        if state == "verifying":
            answer |= {"done_bytes": self._progress.get(pk, 0), "total_bytes": total}
        if not whole:
            return answer
        kept = {"aliases": orjson.loads(aliases), "metadata": orjson.loads(metadata)}
        return {**orjson.loads(manifest), **kept, **answer}

    def find_file(self, run: str, name: str, path: str) -> ManifestFile:
        """Return a file of a published checkpoint.

        Raises:
            ApiError: 404, there is none, or it is not published.
        """
        manifest = self.describe(run, name)
        if manifest["state"] != "published":
            raise ApiError(404, f"checkpoint {name!r} is {manifest['state']}, not published")
        for file in manifest["files"]:
            if file["path"] == path:
                found: ManifestFile = file
                return found
        raise ApiError(404, f"checkpoint {name!r} has no file {path[:400]!r}")

    def _enqueue(self, pk: int) -> Future[None]:
        with self._lock:
            if pk not in self._done:
                self._done[pk] = Future()
                self._waiting.put(pk)
            return self._done[pk]

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

        def finish(connection: sqlite3.Connection) -> bool:
            changed = connection.execute(
                "UPDATE checkpoint SET state=?, error=? WHERE pk=? AND state='verifying' "
                "AND manifest=?",
                (outcome.state, outcome.error, pk, text),
            )
            return changed.rowcount == 1

        if not self._database.write(finish).result():
            return False
        self._hub.publish("checkpoint", {"run": run, "name": name, "state": outcome.state})
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


def _accept(
    connection: sqlite3.Connection,
    run: str,
    manifest: Manifest,
    sizes: dict[str, int],
    missing: bool,
    error: str | None,
) -> tuple[int, str]:
    """Store a manifest with its state; return the checkpoint's key and that state."""
    run_pk = find_run(connection, run)
    name = manifest["name"]
    row = connection.execute(
        "SELECT pk, state, manifest FROM checkpoint WHERE run=? AND name=?", (run_pk, name)
    ).fetchone()
    if row is not None and row[2] is not None:
        known = orjson.loads(row[2])
        same = known["files"] == manifest["files"] and known["step"] == manifest["step"]
        if row[1] == "published" and not same:
            message = f"another checkpoint {name!r} is published: save under another name"
            raise ApiError(409, message, state="published")
        if same and row[1] in ("published", "verifying", "failed"):
            _describe_anew(connection, row[0], manifest)
            return row[0], row[1]
    state = "failed" if error else "incomplete" if missing else "verifying"
    pk: int = connection.execute(
        "INSERT INTO checkpoint (run, name, step, created, state, error, bytes, aliases, metadata, "
        "manifest) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, name) DO UPDATE SET "
        "step=excluded.step, created=excluded.created, state=excluded.state, "
        "error=excluded.error, bytes=excluded.bytes, aliases=excluded.aliases, "
        "metadata=excluded.metadata, manifest=excluded.manifest, removed=NULL, reason=NULL "
        "RETURNING pk",
        (
            run_pk,
            name,
            manifest["step"],
            manifest["created"],
            state,
            error,
            sum(file["bytes"] for file in manifest["files"]),
            orjson.dumps(manifest["aliases"]).decode(),
            orjson.dumps(manifest["metadata"]).decode(),
            orjson.dumps(manifest).decode(),
        ),
    ).fetchone()[0]
    connection.execute("DELETE FROM checkpoint_part WHERE checkpoint=?", (pk,))
    connection.executemany(
        "INSERT INTO checkpoint_part VALUES (?, ?, ?)",
        [(pk, sha256, size) for sha256, size in sizes.items()],
    )
    return pk, state


def _describe_anew(connection: sqlite3.Connection, pk: int, manifest: Manifest) -> None:
    connection.execute(
        "UPDATE checkpoint SET aliases=?, metadata=? WHERE pk=?",
        (
            orjson.dumps(manifest["aliases"]).decode(),
            orjson.dumps(manifest["metadata"]).decode(),
            pk,
        ),
    )
