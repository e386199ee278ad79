"""Checkpoints: manifests that are accepted, verified (`verification`), and then published.

States: `announced` (only the journal speaks of it), `incomplete` (parts are missing), `verifying`,
`published`, `failed`, `removed` (published once; its manifest says what it was, and why it went).
Only a published one can be read.
"""

from __future__ import annotations

import functools
import sqlite3
from concurrent.futures import Future
from typing import Any

import orjson

from endlex.protocol import REPLACES, EndlexError, Manifest, ManifestFile, check_manifest
from endlex.server.errors import ApiError
from endlex.server.store.blobs import Blobs
from endlex.server.store.database import Database
from endlex.server.store.queries import dicts, find_run
from endlex.server.store.verification import Verifier

STATUS_OF_STATE = {"published": 200, "verifying": 202, "incomplete": 409, "failed": 422}


class Checkpoints:
    """Accepts and describes the checkpoints of one server."""

    def __init__(self, database: Database, blobs: Blobs, verifier: Verifier) -> None:
        self._database, self._blobs, self._verifier = database, blobs, verifier

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
            held = {sha256: self._blobs.size(sha256) for sha256 in sizes}
            missing = [sha256 for sha256, size in held.items() if size is None]
            wrong = next((s for s in sizes if held[s] not in (None, sizes[s])), None)
            fault = wrong and (
                f"part {wrong} has {held[wrong]:,} bytes, and the manifest says {sizes[wrong]:,}"
            )
            state = "failed" if fault else "incomplete" if missing else "verifying"
            job = functools.partial(_accept, run=run, manifest=manifest, state=state, error=fault)
            pk, state = self._database.write(job).result()
        if state == "incomplete":
            message = f"{len(missing)} parts of {name!r} are not here: send them, then this again"
            raise ApiError(409, message, state="incomplete", missing=missing)
        return self._verifier.enqueue(pk) if state == "verifying" else None

    def describe(self, run: str, name: str, *, whole: bool = True) -> dict[str, Any]:
        """Return a checkpoint's state and, if `whole`, its manifest's keys.

        Raises:
            ApiError: 404.
        """
        with self._database.snapshot() as connection:
            found = dicts(
                connection,
                "SELECT pk, state, error, bytes, manifest, aliases, metadata, removed, reason "
                "FROM checkpoint WHERE run=? AND name=? AND manifest IS NOT NULL",
                (find_run(connection, run), name),
            )
        if not found:
            raise ApiError(404, f"checkpoint {name[:120]!r} of run {run!r} is not here")
        known = found[0]
        answer = {key: known[key] for key in ("state", "bytes")}
        answer |= {k: known[k] for k in ("removed", "reason", "error") if known[k] is not None}
        if known["state"] == "verifying":
            done = self._verifier.hashed_bytes(known["pk"])
            answer |= {"done_bytes": done, "total_bytes": known["bytes"]}
        if not whole:
            return answer
        kept = {key: known[key] for key in ("aliases", "metadata")}
        return {**orjson.loads(known["manifest"]), **kept, **answer}

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


def _accept(
    connection: sqlite3.Connection, run: str, manifest: Manifest, state: str, error: str | None
) -> tuple[int, str]:
    """Store a manifest with its state; return the checkpoint's key and the state it has now."""
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
            _describe_anew(connection, row[0], manifest, known)
            return row[0], row[1]
    values = {
        "run": run_pk,
        "name": name,
        "step": manifest["step"],
        "created": manifest["created"],
        "state": state,
        "error": error,
        "bytes": sum(file["bytes"] for file in manifest["files"]),
        "aliases": orjson.dumps(manifest["aliases"]).decode(),
        "metadata": orjson.dumps(manifest["metadata"]).decode(),
        "manifest": orjson.dumps(manifest).decode(),
        "removed": None,
        "reason": None,
    }
    changes = ", ".join(f"{column}=excluded.{column}" for column in values)
    pk: int = connection.execute(
        f"INSERT INTO checkpoint ({', '.join(values)}) VALUES (:{', :'.join(values)}) "
        f"ON CONFLICT (run, name) DO UPDATE SET {changes} RETURNING pk",
        values,
    ).fetchone()[0]
    connection.execute("DELETE FROM checkpoint_part WHERE checkpoint=?", (pk,))
    parts = {part["sha256"]: part["bytes"] for file in manifest["files"] for part in file["parts"]}
    connection.executemany(
        "INSERT INTO checkpoint_part VALUES (?, ?, ?)", [(pk, *part) for part in parts.items()]
    )
    return pk, state


def _describe_anew(
    connection: sqlite3.Connection, pk: int, manifest: Manifest, known: Manifest
) -> None:
    """Update aliases and metadata, but not which older checkpoints it replaces."""
    metadata = {k: v for k, v in manifest["metadata"].items() if k != REPLACES}
    metadata |= {k: v for k, v in known["metadata"].items() if k == REPLACES}
    connection.execute(
        "UPDATE checkpoint SET aliases=?, metadata=? WHERE pk=?",
        (orjson.dumps(manifest["aliases"]).decode(), orjson.dumps(metadata).decode(), pk),
    )
