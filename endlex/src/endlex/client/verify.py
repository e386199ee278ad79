"""Compare a run's directory with the server by hash: may this machine be torn down?"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from endlex import protocol
from endlex.client import checkpoints
from endlex.client.directories import require_run_file
from endlex.client.process import describe
from endlex.client.shipper.control import failed_checkpoints, shipper_process
from endlex.client.shipper.send_checkpoints import missing_parts
from endlex.client.shipper.send_journals import SessionDiffers, SessionShipper
from endlex.client.transport import Refused, Transport, TransportError, quoted
from endlex.protocol import CHECKPOINT, REPLACES, EndlexError, Manifest
from endlex.reading import parse_record, session_files, session_kind, writer_is_alive

OTHER_KINDS = protocol.METRICS, protocol.TEXT, protocol.TABLE
OTHER_STARTS = tuple(f'{{"type":"{kind}",'.encode() for kind in OTHER_KINDS)
"""How the journal's lines begin that name no checkpoint and no media: these need no parsing."""

Remedy = Literal["sync", "resend", "wait", "drop", "restore", "look"]
"""What helps: `endlex sync`, with `--resend` or `--drop-failed`; to wait; to restore the server;
to look at the journal."""


@dataclass(frozen=True)
class Missing:
    """Why a directory may not be deleted yet; as text, one line for people."""

    kind: Literal["journal", "checkpoint", "media", "live"]
    name: str  # a session, a checkpoint, or what lives: a session, or `shipper`
    reason: str
    remedy: Remedy = "sync"

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.reason}"


@dataclass(frozen=True)
class LetGo:
    """A checkpoint that the server published and that a rule or a person removed since."""

    name: str
    removed: float  # Unix seconds
    reason: str


@dataclass(frozen=True)
class Comparison:
    """A run's directory beside what the server has; safe to delete when nothing is missing."""

    missing: list[Missing] = field(default_factory=list)
    let_go: list[LetGo] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)  # checkpoints that could not be sent
    no_checkpoint: bool = False  # on the server, none waits, and none was removed on purpose


_Saved = tuple[float, Any]  # when, in Unix seconds, and the word with which it replaces others


def require_all_sent(directory: Path, transport: Transport, published: Collection[str]) -> None:
    """Check that the server has what was here; what a live trainer adds meanwhile may be missing.

    The `published` checkpoints are there, though they are still staged.
    """
    missing = compare_directory(directory, transport).missing
    missing = [one for one in missing if one.kind != "checkpoint" or one.name not in published]
    if any(one.kind == "live" for one in missing):
        missing = [one for one in missing if one.remedy == "resend"]
    if missing:
        raise EndlexError("; ".join(map(str, missing)))


def compare_directory(directory: Path, transport: Transport) -> Comparison:
    """Compare a run's directory with the server by hash.

    Every session's journal must be there and equal, every checkpoint that was saved be published
    with the files that were hashed here, or have been until it was removed on purpose, no
    checkpoint wait, no trainer write and no shipper work.
    """
    run, shipper = require_run_file(directory)["run"], shipper_process(directory)
    missing, let_go = list[Missing](), list[LetGo]()
    saved, media, damaged_lines = dict[str, _Saved](), dict[str, str](), list[Missing]()
    for path in session_files(directory):
        missing += _compare_journal(run, path, transport, shipper is not None)
        damaged_lines += _read_journal(path, saved, media)
    staged, failed = checkpoints.staged_names(directory), failed_checkpoints(directory)
    for name in staged:
        if name in failed:
            reason = f"it cannot be sent: {failed[name]}"
            missing.append(Missing("checkpoint", name, reason, "drop"))
        else:
            missing.append(Missing("checkpoint", name, "not sent yet, or not published"))
    dropped = checkpoints.given_up(directory)
    hashed = {path.stem for path in (directory / protocol.MANIFEST_DIR).glob("*.json")}
    sent = sorted({*saved, *hashed} - {*staged, *dropped})
    for name in sent:
        found = _compare_checkpoint(run, directory, name, saved.get(name), transport)
        if isinstance(found, LetGo):
            let_go.append(found)
        elif found is not None:
            missing.append(found)
    missing += [*_compare_media(directory, media, dropped, transport), *damaged_lines]
    if shipper is not None:
        reason = f"{describe(shipper.name)} is still at work: wait for it"
        missing.append(Missing("live", "shipper", reason, "wait"))
    no_checkpoint = not staged and not sent and not _list_published(run, transport)
    return Comparison(missing, let_go, sorted(dropped), no_checkpoint)


def _compare_journal(run: str, path: Path, server: Transport, shipper: bool) -> Iterator[Missing]:
    is_shippers = shipper and session_kind(path) == protocol.SYSTEM
    if not is_shippers and writer_is_alive(path):
        yield Missing("live", path.stem, "a process still writes this session: end it", "wait")
    try:
        left = SessionShipper(run, path, server).missing_bytes()
    except SessionDiffers as error:
        yield Missing("journal", path.stem, str(error), "resend")
    else:
        if left:
            yield Missing("journal", path.stem, f"{left:,} bytes are not sent")


def _read_journal(path: Path, saved: dict[str, _Saved], media: dict[str, str]) -> Iterator[Missing]:
    """Add the records of checkpoints by name, and the names of logged files by their parts' hashes.

    Yields the lines that cannot be read, and so may name something more.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n") or line.startswith(OTHER_STARTS):
                continue
            try:
                record: Any = parse_record(line)
                if record["type"] == CHECKPOINT:
                    replaces = (record.get("metadata") or {}).get(REPLACES)
                    saved[record["name"]] = (float(record["time"]), replaces)
                elif record["type"] == protocol.MEDIA:
                    for part in record["parts"]:
                        media[protocol.check_sha256(part["sha256"])] = str(record["name"])
            except (KeyError, TypeError, ValueError, AttributeError, EndlexError):
                reason = f"line {number} is damaged and may name a checkpoint or a logged file"
                yield Missing("journal", path.stem, reason, "look")


def _compare_media(
    directory: Path, media: dict[str, str], dropped: set[str], transport: Transport
) -> Iterator[Missing]:
    """Yield the logged files of which the server lacks a part; `media` has their names by hash."""
    waiting, damaged = checkpoints.waiting_media(directory), checkpoints.damaged_media(directory)
    lacking, _ = missing_parts(transport, list(dict.fromkeys([*media, *damaged])))
    for sha256 in dict.fromkeys([*lacking, *waiting]):
        name = media.get(sha256, sha256)
        if sha256 in waiting or not (sha256 in damaged or sha256 in dropped):
            yield Missing("media", name, "one of its files is not sent yet")
        elif sha256 in damaged:
            yield Missing("media", name, "one of its files was damaged before it was sent", "drop")


def _compare_checkpoint(
    run: str, directory: Path, name: str, saved: _Saved | None, transport: Transport
) -> Missing | LetGo | None:
    """Return what is wrong with a checkpoint that was sent, or that it was removed on purpose."""
    ours = None
    try:
        ours = checkpoints.load_manifest(directory, name)
        theirs, let_go = fetch_manifest(run, name, transport)
    except TransportError:
        raise
    except EndlexError as error:
        if saved is not None and _is_replaced(run, *saved, transport):
            return None
        if ours is not None and isinstance(error, Unknown):
            reason = f"{error}, though it was published there once"
            return Missing("checkpoint", name, reason, "restore")
        return Missing("checkpoint", name, str(error))
    if ours is not None and ours["files"] != theirs["files"]:
        return Missing("checkpoint", name, "the server's files differ from those saved here")
    return let_go


def _is_replaced(run: str, time: float, word: Any, transport: Transport) -> bool:
    """Whether the server has a checkpoint saved after `time` to replace those of this word."""
    return word is not None and any(
        created > time and replaces == word for created, replaces in _list_published(run, transport)
    )


def _list_published(run: str, transport: Transport) -> list[_Saved]:
    """Return when each of the run's checkpoints on the server was saved, and what it replaces."""
    try:
        return [
            (float(other["created"]), (other["metadata"] or {}).get(REPLACES))
            for other in transport.request("GET", quoted("runs", run, "checkpoints")).content
            if other["state"] == "published"
        ]
    except Refused:
        return []
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise transport.ill_answer() from error


class Unknown(EndlexError):
    """The server knows no checkpoint of this name."""


def fetch_manifest(run: str, name: str, transport: Transport) -> tuple[Manifest, LetGo | None]:
    """Return the manifest of a checkpoint that the server has published, and if it was removed.

    It raises `Unknown` if there is none of this name, and `EndlexError` if it is not published.
    """
    try:
        answer = transport.request("GET", quoted("runs", run, "checkpoints", name))
    except Refused as error:
        if error.status == 404:
            raise Unknown(f"the server has no checkpoint {name!r} of run {run}") from error
        raise
    content = answer.content if isinstance(answer.content, dict) else {}
    state = content.get("state")
    if state not in ("published", protocol.REMOVED):
        raise EndlexError(f"checkpoint {name!r} of run {run} is {state!r}, not published yet")
    manifest = protocol.check_manifest(content)
    if manifest["name"] != name:
        raise EndlexError(f"the server sent checkpoint {manifest['name']!r} in place of {name!r}")
    if state == "published":
        return manifest, None
    removed = content.get("removed")
    moment = float(removed) if isinstance(removed, int | float) else 0.0
    return manifest, LetGo(name, moment, str(content.get("reason")))
