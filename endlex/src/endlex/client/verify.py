"""Compare a run's directory with the server by hash: may this machine be torn down?"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from endlex.client.checkpoints import (
    damaged_media,
    given_up,
    load_manifest,
    staged_names,
    waiting_media,
)
from endlex.client.directories import require_run_file
from endlex.client.process import describe
from endlex.client.shipper.control import failed_checkpoints, shipper_process
from endlex.client.shipper.send_checkpoints import missing_parts
from endlex.client.shipper.send_journals import SessionDiffers, SessionShipper
from endlex.client.transport import Refused, Transport, TransportError, quoted
from endlex.protocol import (
    CHECKPOINT,
    MANIFEST_DIR,
    MEDIA,
    METRICS,
    REMOVED,
    REPLACES,
    SYSTEM,
    TABLE,
    TEXT,
    EndlexError,
    Manifest,
    check_manifest,
    check_sha256,
)
from endlex.reading import parse_record, session_files, session_kind, writer_is_alive

OTHER_STARTS = tuple(f'{{"type":"{kind}",'.encode() for kind in (METRICS, TEXT, TABLE))
"""How the journal's lines begin that name no checkpoint and no media: these need no parsing."""

Remedy = Literal["sync", "resend", "wait", "drop", "restore", "look"]
"""What helps: `endlex sync`, with `--resend` or `--drop-failed`; to wait; to restore the server;
to look at the journal."""


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
    announced = _read_announced(directory)
    hashed = {path.stem for path in (directory / MANIFEST_DIR).glob("*.json")}
    for name in sorted({*announced.checkpoints, *hashed}):
        if name not in staged and name not in dropped:
            saved = announced.checkpoints.get(name, _Saved())
            found = _verify_checkpoint(owner["run"], directory, name, saved, transport)
            let_go += [found] if isinstance(found, LetGo) else []
            missing += [found] if isinstance(found, Missing) else []
    missing += [*_verify_media(directory, announced.media, transport), *announced.damaged]
    if shipper is not None:
        reason = f"{describe(shipper.name)} is still at work: wait for it"
        missing.append(Missing("live", "shipper", reason, "wait"))
    return Comparison(missing, let_go, sorted(dropped))


class _Saved(NamedTuple):
    """A checkpoint as its journal record describes it."""

    time: float = math.inf
    replaces: str | None = None


@dataclass
class _Announced:
    """What a run's journals say of its checkpoints and media."""

    checkpoints: dict[str, _Saved] = field(default_factory=dict)
    media: dict[str, str] = field(default_factory=dict)
    """Names of logged files, by the hash of each part."""
    damaged: list[Missing] = field(default_factory=list)


def _read_announced(directory: Path) -> _Announced:
    """Read what was saved and logged; a damaged line may hide something, so it is missing."""
    found = _Announced()
    for path in session_files(directory):
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n") or line.startswith(OTHER_STARTS):
                    continue
                try:
                    _add_announced(found, parse_record(line))
                except (KeyError, TypeError, ValueError, AttributeError, EndlexError):
                    reason = f"line {number} is damaged and may name a checkpoint or a logged file"
                    found.damaged.append(Missing("journal", path.stem, reason, "look"))
    return found


def _add_announced(found: _Announced, record: Any) -> None:
    """Add a record; raises what reading a damaged one raises."""
    if record["type"] == CHECKPOINT:
        replaces = (record.get("metadata") or {}).get(REPLACES)
        found.checkpoints[record["name"]] = _Saved(float(record["time"]), replaces)
    elif record["type"] == MEDIA:
        found.media |= {check_sha256(p["sha256"]): str(record["name"]) for p in record["parts"]}


def _verify_media(
    directory: Path, announced: dict[str, str], transport: Transport
) -> Iterator[Missing]:
    """Yield the logged files that the server lacks, and those that still wait here."""
    waiting, damaged = waiting_media(directory), damaged_media(directory)
    lacking, _ = missing_parts(transport, list(dict.fromkeys([*announced, *damaged])))
    for sha256 in dict.fromkeys([*lacking, *waiting]):
        name = announced.get(sha256, sha256)
        if sha256 in waiting or sha256 not in [*damaged, *given_up(directory)]:
            yield Missing("media", name, "one of its files is not sent yet")
        elif sha256 in damaged:
            yield Missing("media", name, "one of its files was damaged before it was sent", "drop")


def _verify_journal(run: str, path: Path, transport: Transport, has_shipper: bool) -> list[Missing]:
    found = []
    is_shippers = has_shipper and session_kind(path) == SYSTEM
    if not is_shippers and writer_is_alive(path):
        reason = "a process still writes this session: end it"
        found.append(Missing("live", path.stem, reason, "wait"))
    try:
        if left := SessionShipper(run, path, transport).missing_bytes():
            found.append(Missing("journal", path.stem, f"{left:,} bytes are not sent"))
    except SessionDiffers as error:
        found.append(Missing("journal", path.stem, str(error), "resend"))
    return found


def _verify_checkpoint(
    run: str, directory: Path, name: str, saved: _Saved, transport: Transport
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


def _is_replaced(run: str, saved: _Saved, transport: Transport) -> bool:
    """Whether the server has a later checkpoint that was saved to replace this one."""
    if saved.replaces is None:
        return False
    try:
        listed = transport.request("GET", quoted("runs", run, "checkpoints")).content
        return any(
            other["state"] == "published"
            and other["created"] > saved.time
            and (other["metadata"] or {}).get(REPLACES) == saved.replaces
            for other in listed
        )
    except Refused:
        return False
    except (KeyError, TypeError, AttributeError) as error:
        raise transport.ill_answer() from error


class Removed(EndlexError):
    """The server published this checkpoint and removed it since, on purpose.

    Attributes:
        removed: Unix seconds.
        reason: such as "pruned by keep-last 3".
        manifest: what it was.
    """

    def __init__(self, message: str, removed: float, reason: str, manifest: Manifest) -> None:
        super().__init__(message)
        self.removed, self.reason, self.manifest = removed, reason, manifest


class Unknown(EndlexError):
    """The server knows no checkpoint of this name."""


def fetch_manifest(run: str, name: str, transport: Transport) -> Manifest:
    """The manifest of a checkpoint that the server has published.

    Raises:
        Unknown: there is none of this name.
        Removed: a rule or a person removed it.
        EndlexError: it is not published.
        Retry: the server is not there.
    """
    try:
        answer = transport.request("GET", quoted("runs", run, "checkpoints", name))
    except Refused as error:
        if error.status == 404:
            raise Unknown(f"the server has no checkpoint {name!r} of run {run}") from error
        raise
    content = answer.content if isinstance(answer.content, dict) else {}
    state = content.get("state")
    if state not in ("published", REMOVED):
        raise EndlexError(f"checkpoint {name!r} of run {run} is {state!r}, not published yet")
    manifest = check_manifest(content)
    if manifest["name"] != name:
        raise EndlexError(f"the server sent checkpoint {manifest['name']!r} in place of {name!r}")
    if state == REMOVED:
        reason, removed = str(content.get("reason")), content.get("removed")
        removed = float(removed) if isinstance(removed, int | float) else 0.0
        message = f"checkpoint {name!r} of run {run} is no longer on the server: {reason}"
        raise Removed(message, removed, reason, manifest)
    return manifest
