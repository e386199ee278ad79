"""Checkpoints: manifests that are accepted, verified in a thread, and then published.

States: `announced` (only the journal speaks of it), `incomplete` (parts are missing), `verifying`,
`published`, `failed`, `removed` (published once; its manifest says what it was, and why it went).
Only a published one can be read. The state is in the database: what was being verified when the
server ended is verified from the beginning when it starts again.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import sqlite3
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from sqlite3 import Connection
from typing import Any

import orjson

from endlex.protocol import REMOVED, REPLACES, EndlexError, Manifest, ManifestFile, check_manifest
from endlex.server.errors import ApiError
from endlex.server.events import Hub
from endlex.server.store.blobs import Blobs
from endlex.server.store.database import Database, dicts, insert, update
from endlex.server.store.retention import remove_replaced
from endlex.server.store.runs import find_run

logger = logging.getLogger("endlex")

STATUS_OF_STATE = {"published": 200, "verifying": 202, "incomplete": 409, "failed": 422}


class Checkpoints:
    """The checkpoints of one server, and the thread that hashes what was accepted, one by one."""

    def __init__(self, database: Database, blobs: Blobs, hub: Hub) -> None:
        self._database, self._blobs, self._hub = database, blobs, hub
        self._pool = ThreadPoolExecutor(1, "endlex-verify")
        self._progress: dict[int, int] = {}
        """How many bytes of each that is being verified were read."""
        self._running: dict[int, Future[None]] = {}
        self._stopping = False
        self._lock = threading.Lock()
        rows = database.reader().execute("SELECT pk FROM checkpoint WHERE state='verifying'")
        for (pk,) in rows.fetchall():  # left over from the last time
            self._enqueue(pk)

    def stop(self) -> None:
        """End the thread; what it was verifying stays `verifying`."""
        with self._lock:
            self._stopping = True
        self._pool.shutdown(cancel_futures=True)

    def _enqueue(self, pk: int) -> Future[None]:
        with self._lock:
            if self._stopping:
                return Future()
            if pk not in self._running:
                self._running[pk] = self._pool.submit(self._work, pk)
            return self._running[pk]

    def put(self, run: str, name: str, content: Any) -> Future[None] | None:
        """Accept a manifest; call it in a thread, and ask `describe` for the result.

        What is returned ends when it is verified; it is None where that was done before.
        """
        try:
            manifest = check_manifest(content)
        except EndlexError as error:
            raise ApiError(422, str(error), state="failed") from error
        if manifest["name"] != name:
            raise ApiError(422, f"the manifest is of {manifest['name']!r}, not of {name!r}")
        sizes = _part_sizes(manifest)
        with self._blobs.lock:  # no part may go between this look and the commit
            held = {sha256: self._blobs.size(sha256) for sha256 in sizes}
            missing = [sha256 for sha256, size in held.items() if size is None]
            state, fault = "incomplete" if missing else "verifying", None
            if wrong := [one for one, size in sizes.items() if held[one] not in (None, size)]:
                one, state = wrong[0], "failed"
                fault = f"part {one} has {held[one]:,} bytes, and the manifest says {sizes[one]:,}"
            job = functools.partial(_accept, run=run, manifest=manifest, state=state, error=fault)
            pk, state = self._database.write(job).result()
        if state == "incomplete":
            message = f"{len(missing)} parts of {name!r} are not here: send them, then this again"
            raise ApiError(409, message, state="incomplete", missing=missing)
        return self._enqueue(pk) if state == "verifying" else None

    def describe(
        self, db: Connection, run: str, name: str, *, whole: bool = True
    ) -> dict[str, Any]:
        """Return a checkpoint's state and, if `whole`, its manifest's keys; or raise 404."""
        about = "manifest, aliases, metadata" if whole else "'{}' AS manifest"
        found = dicts(
            db,
            f"SELECT pk, state, error, bytes, removed, reason, {about} FROM checkpoint "
            "WHERE run=? AND name=? AND checkpoint.manifest IS NOT NULL",
            (find_run(db, run), name),
        )
        if not found:
            raise ApiError(404, f"checkpoint {name[:120]!r} of run {run!r} is not here")
        known = {key: value for key, value in found[0].items() if value is not None}
        pk, manifest = known.pop("pk"), known.pop("manifest")
        if known["state"] == "verifying":
            known |= {"done_bytes": self._progress.get(pk, 0), "total_bytes": known["bytes"]}
        return dict(manifest | known)

    def find_file(self, db: Connection, run: str, name: str, path: str) -> ManifestFile:
        """Return a file of a published checkpoint, or raise an `ApiError` 404."""
        manifest = self.describe(db, run, name)
        if manifest["state"] != "published":
            raise ApiError(404, f"checkpoint {name!r} is {manifest['state']}, not published")
        files: dict[str, ManifestFile] = {file["path"]: file for file in manifest["files"]}
        if path not in files:
            raise ApiError(404, f"checkpoint {name!r} has no file {path[:400]!r}")
        return files[path]

    def _work(self, pk: int) -> None:
        try:
            while not self._verify(pk):
                logger.info("checkpoint %d was replaced while it was verified", pk)
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
        if state == "verifying":  # the server stops
            return True

        def finish(db: Connection) -> list[str] | None:
            query = "SELECT 1 FROM checkpoint WHERE pk=? AND state='verifying' AND manifest=?"
            if db.execute(query, (pk, text)).fetchone() is None:
                return None
            update(db, "checkpoint", pk, state=state, error=error)
            return remove_replaced(db, pk) if state == "published" else []

        replaced = self._database.write(finish).result()
        if replaced is None:
            return False
        for other, now in [(name, state), *((gone, REMOVED) for gone in replaced)]:
            self._hub.publish("checkpoint", {"run": run, "name": other, "state": now})
        return True

    def _judge(self, pk: int, manifest: Manifest) -> tuple[str, str | None]:
        """Return the state after the verification, and what is wrong; nothing while stopping."""
        for file in manifest["files"]:
            digest = hashlib.sha256()
            for part in file["parts"]:
                try:
                    for piece in self._blobs.iter_part(part["sha256"]):
                        digest.update(piece)
                        self._progress[pk] += len(piece)
                        if self._stopping:
                            return "verifying", None
                except FileNotFoundError:
                    return "incomplete", f"part {part['sha256']} is gone: send it again"
            found = digest.hexdigest()
            if found != file["sha256"]:
                decayed = sum(map(self._blobs.drop_decayed, {p["sha256"] for p in file["parts"]}))
                if decayed:
                    said = f"{decayed} parts were damaged on the server's disk: send them again"
                    return "incomplete", said
                said = f"has SHA-256 {found}, and the manifest says {file['sha256']}"
                return "failed", f"{file['path']!r} {said}"
        return "published", None


def _part_sizes(manifest: Manifest) -> dict[str, int]:
    return {part["sha256"]: part["bytes"] for file in manifest["files"] for part in file["parts"]}


def _accept(
    db: Connection, run: str, manifest: Manifest, state: str, error: str | None
) -> tuple[int, str]:
    """Store a manifest with its state; return the checkpoint's key and the state it has now."""
    run_pk = find_run(db, run)
    name = manifest["name"]
    row = db.execute(
        "SELECT pk, state, manifest FROM checkpoint WHERE run=? AND name=?", (run_pk, name)
    ).fetchone()
    if row is not None and row[2] is not None:
        known = orjson.loads(row[2])
        same = known["files"] == manifest["files"] and known["step"] == manifest["step"]
        if row[1] == "published" and not same:
            message = f"another checkpoint {name!r} is published: save under another name"
            raise ApiError(409, message, state="published")
        if same and row[1] in ("published", "verifying", "failed"):
            # Aliases and metadata are new, but not which older checkpoints it replaces.
            metadata = {k: v for k, v in manifest["metadata"].items() if k != REPLACES}
            metadata |= {k: v for k, v in known["metadata"].items() if k == REPLACES}
            update(db, "checkpoint", row[0], aliases=manifest["aliases"], metadata=metadata)
            return row[0], row[1]
    values: dict[str, Any] = {
        **{key: manifest[key] for key in ("name", "step", "created", "aliases", "metadata")},
        **{"run": run_pk, "bytes": sum(file["bytes"] for file in manifest["files"])},
        **{"state": state, "error": error, "manifest": manifest, "removed": None, "reason": None},
    }
    if row:
        update(db, "checkpoint", row[0], **values)
    pk = row[0] if row else insert(db, "checkpoint", **values)
    db.execute("DELETE FROM checkpoint_part WHERE checkpoint=?", (pk,))
    db.executemany(
        "INSERT INTO checkpoint_part VALUES (?, ?, ?)",
        [(pk, *part) for part in _part_sizes(manifest).items()],
    )
    return pk, state
