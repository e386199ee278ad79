"""Manifests: what a checkpoint's files are, hashed in one pass over each, whole and in parts."""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path

from endlex.client.checkpoints import Staged, read_note
from endlex.client.process import READ_ONLY, write_whole
from endlex.protocol import (
    MANIFEST_DIR,
    PART_BYTES,
    PROTOCOL,
    STAGED_DIR,
    EndlexError,
    Manifest,
    ManifestFile,
    Part,
    check_manifest,
)

READ_BYTES = 2**20


class CheckpointFailed(EndlexError):
    """This checkpoint cannot be published as it is; trying again does not help."""


class FileChanged(CheckpointFailed):
    """A file is not what it was when it was saved."""


def manifest_path(directory: Path, name: str) -> Path:
    """Where this side keeps what it hashed."""
    return directory / MANIFEST_DIR / f"{name}.json"


def load_manifest(path: Path) -> Manifest | None:
    """A manifest that was kept, or None if there is none.

    Raises:
        EndlexError: it is damaged.
    """
    try:
        return check_manifest(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, EndlexError) as error:
        raise EndlexError(f"{path} is damaged ({error}): delete it, it is made again") from error


def build_manifest(root: Path, note: Staged) -> Manifest:
    """Hash files, in one pass over each.

    Args:
        root: holds them under the paths of the note.

    Raises:
        FileChanged: one is not what the note says.
    """
    files = [
        _hash_file(root / f["path"], f["path"], f["bytes"], f["changed"]) for f in note["files"]
    ]
    return {
        "protocol": PROTOCOL,
        "name": note["name"],
        "step": note["step"],
        "created": note["created"],
        "aliases": note["aliases"],
        "metadata": note["metadata"],
        "files": files,
    }


def _hash_file(path: Path, inside: str, size: int, changed: int) -> ManifestFile:
    whole, parts, held = hashlib.sha256(), [], 0
    with open_unchanged(path, inside, size, changed) as file:
        while held < size:
            part, length = hashlib.sha256(), 0
            while length < PART_BYTES:
                block = file.read(min(READ_BYTES, PART_BYTES - length))
                if not block:
                    break
                part.update(block)
                whole.update(block)
                length += len(block)
            if not length:
                break
            parts.append(Part(sha256=part.hexdigest(), bytes=length))
            held += length
        require_unchanged(file.fileno(), inside, size, changed)
    if held != size:
        raise changed_error(inside)
    return {"path": inside, "bytes": size, "sha256": whole.hexdigest(), "parts": parts}


def open_unchanged(path: Path, inside: str, size: int, changed: int) -> io.FileIO:
    try:
        file = path.open("rb", buffering=0)
    except OSError as error:
        raise FileChanged(f"{inside!r} cannot be read ({error}): save it again") from error
    try:
        require_unchanged(file.fileno(), inside, size, changed)
    except BaseException:
        file.close()
        raise
    return file


def require_unchanged(descriptor: int, inside: str, size: int, changed: int) -> None:
    status = os.fstat(descriptor)
    if (status.st_size, status.st_mtime_ns) != (size, changed):
        raise changed_error(inside)


def changed_error(inside: str) -> FileChanged:
    """What to say of a file that was rewritten."""
    return FileChanged(
        f"file changed: {inside!r} was rewritten in place after it was saved; write checkpoints "
        "under a temporary name and rename them, and save this one again"
    )


def staged_manifest(directory: Path, name: str) -> Manifest:
    """The manifest of a staged checkpoint, made and kept when it is first asked for.

    Raises:
        FileChanged: a file is not what it was when it was saved.
        EndlexError: the note of the checkpoint is damaged.
    """
    path = manifest_path(directory, name)
    try:
        kept = load_manifest(path)
    except EndlexError:
        kept = None
    if kept is not None:
        return kept
    manifest = build_manifest(directory / STAGED_DIR / name, read_note(directory, name))
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(manifest).encode())
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return manifest
