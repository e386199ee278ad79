"""Compare a run's directory with the server by hash: may this machine be torn down?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from endlex.client.checkpoints import (
    damaged_media,
    given_up,
    load_manifest,
    staged_names,
    waiting_media,
)
from endlex.client.downloads import Removed, Unknown, fetch_manifest
from endlex.client.journal_sync import SessionDiffers, SessionSync
from endlex.client.process import describe
from endlex.client.run_directory import require_run_file
from endlex.client.shipping import failed_checkpoints, shipper_process
from endlex.client.transport import Refused, Transport, TransportError, quoted
from endlex.client.uploads import missing_parts
from endlex.protocol import MANIFEST_DIR, REPLACES, SYSTEM, EndlexError
from endlex.reading import parse_record, session_files, session_kind, writer_is_alive

CHECKPOINT_START, MEDIA_START = b'{"type":"checkpoint",', b'{"type":"media",'
"""How the journal's lines for checkpoints and media begin: the others need no parsing."""

Remedy = Literal["sync", "resend", "wait", "drop", "restore"]
"""What helps: `endlex sync`, with `--resend` or `--drop-failed`; to wait; to restore the server."""


@dataclass(frozen=True)
class Missing:
    """Why a directory may not be deleted yet; as text, one line for people."""

    kind: Literal["journal", "checkpoint", "media", "live"]
    name: str
    """A session, a checkpoint, or what lives: a session, or `shipper`."""
    reason: str
    remedy: Remedy = "sync"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}"


@dataclass(frozen=True)
class LetGo:
    """A checkpoint that the server published and that a rule or a person removed since."""

    name: str
    removed: float
    """Unix seconds."""
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A run's directory beside what the server has; safe to delete when nothing is missing."""

    missing: list[Missing] = field(default_factory=list)
    let_go: list[LetGo] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    """Checkpoints that somebody decided to do without, since they could not be sent."""


def require_all_sent(directory: Path, transport: Transport, published: Collection[str]) -> None:
    """Check that the server has what was here; what a live trainer adds meanwhile may be missing.

    Args:
        published: checkpoints that are known to be, though they are still staged.
    """
    missing = [
        found
        for found in compare_directory(directory, transport).missing
        if found.kind != "checkpoint" or found.name not in published
    ]
    if any(found.kind == "live" for found in missing):
        missing = [found for found in missing if found.remedy == "resend"]
    if missing:
        raise EndlexError("; ".join(map(str, missing)))


def compare_directory(directory: Path, transport: Transport) -> Comparison:
    """Compare a run's directory with the server by hash.

    Every session's journal must be there and equal, every checkpoint that was saved be published
    with the files that were hashed here, or have been until it was removed on purpose, no
    checkpoint wait, no trainer write and no shipper work.
    """
    owner = require_run_file(directory)
    shipper = shipper_process(directory)
    missing = [
        found
        for path in session_files(directory)
        for found in _verify_journal(owner["run"], path, transport, bool(shipper))
    ]
    staged = staged_names(directory)
    failed, dropped = failed_checkpoints(directory), given_up(directory)
    for name in staged:
        if name in failed:
            reason = f"it cannot be sent: {failed[name]}"
            missing.append(Missing("checkpoint", name, reason, "drop"))
        else:
            missing.append(Missing("checkpoint", name, "not sent yet, or not published"))
    let_go: list[LetGo] = []
    for name, saved in sorted(_saved(directory).items()):
        if name not in staged and name not in dropped:
            found = _verify_checkpoint(owner["run"], directory, name, saved, transport)
            let_go += [found] if isinstance(found, LetGo) else []
            missing += [found] if isinstance(found, Missing) else []
    missing += _verify_media(directory, transport)
    if shipper is not None:
        reason = f"{describe(shipper.name)} is still at work: wait for it"
        missing.append(Missing("live", "shipper", reason, "wait"))
    return Comparison(missing, let_go, sorted(dropped))


def _verify_media(directory: Path, transport: Transport) -> Iterator[Missing]:
    """Yield the logged files that the server lacks, or that are not sent as far as one can tell."""
    names = dict[str, str]()
    for record in _iter_records(directory, MEDIA_START):
        names |= {str(part.get("sha256")): str(record.get("name")) for part in record["parts"]}
    lacking, _ = missing_parts(transport, list(names))
    waiting, damaged = waiting_media(directory), damaged_media(directory)
    for sha256 in dict.fromkeys([*lacking, *waiting, *damaged]):
        name = names.get(sha256, sha256)
        if sha256 in damaged:
            yield Missing("media", name, "one of its files was damaged before it was sent", "drop")
        elif sha256 in waiting or sha256 not in given_up(directory):
            yield Missing("media", name, "one of its files is not sent yet")


def _iter_records(directory: Path, start: bytes) -> Iterator[dict[str, Any]]:
    """Yield the records of one type of a run's journals."""
    for path in session_files(directory):
        with path.open("rb") as file:
            for line in file:
                whole = line.startswith(start) and line.endswith(b"\n")
                if whole and (record := parse_record(line)) is not None:
                    yield record


def _verify_journal(run: str, path: Path, transport: Transport, has_shipper: bool) -> list[Missing]:
    found = []
    is_shippers = has_shipper and session_kind(path) == SYSTEM
    if not is_shippers and writer_is_alive(path):
        reason = "a process still writes this session: end it"
        found.append(Missing("live", path.stem, reason, "wait"))
    try:
        if left := SessionSync(run, path, transport).missing_bytes():
            found.append(Missing("journal", path.stem, f"{left:,} bytes are not sent"))
    except SessionDiffers as error:
        found.append(Missing("journal", path.stem, str(error), "resend"))
    return found


def _saved(directory: Path) -> dict[str, dict[str, Any]]:
    """Return the journal's record of each checkpoint; empty where only its hashes were kept."""
    found: dict[str, dict[str, Any]]
    found = {path.stem: {} for path in (directory / MANIFEST_DIR).glob("*.json")}
    return found | {r["name"]: r for r in _iter_records(directory, CHECKPOINT_START)}


def _verify_checkpoint(
    run: str, directory: Path, name: str, saved: dict[str, Any], transport: Transport
) -> Missing | LetGo | None:
    let_go, ours = None, None
    try:
        ours = load_manifest(directory, name)
        theirs = fetch_manifest(run, name, transport)
    except TransportError:
        raise
    except Removed as error:
        theirs, let_go = error.manifest, LetGo(name, error.removed, error.reason)
    except EndlexError as error:
        if _is_replaced(run, saved, transport):
            return None
        if ours is not None and isinstance(error, Unknown):
            said = f"{error}, though it was published there once"
            return Missing("checkpoint", name, said, "restore")
        return Missing("checkpoint", name, str(error))
    if ours is not None and ours["files"] != theirs["files"]:
        return Missing("checkpoint", name, "the server's files differ from those saved here")
    return let_go


def _is_replaced(run: str, saved: dict[str, Any], transport: Transport) -> bool:
    """Whether the server has a later checkpoint that was saved to replace this one."""
    word = saved.get("metadata", {}).get(REPLACES)
    if word is None:
        return False
    try:
        listed = transport.request("GET", quoted("runs", run, "checkpoints")).content
    except Refused:
        return False
    return any(
        other["state"] == "published"
        and other["created"] > saved["time"]
        and (other.get("metadata") or {}).get(REPLACES) == word
        for other in listed
    )
