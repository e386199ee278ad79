"""Names, limits, record types and wire types: what both halves of Endlex agree on.

A run's directory holds one journal file per session (a process that writes), and a journal is a
file of JSON lines. Each record is one object with `type`, `session`, `seq` (0, 1, 2, ... within
the session) and `time` (Unix seconds); endlex/docs/protocol.md lists the other keys of each type.
`session` is the first of every session. A journal's content is its bytes up to the last line end:
what follows is torn. Readers keep and ignore types that they do not know.

JSON has no NaN and no infinities: in `values` and in `config` they are the strings "NaN",
"Infinity" and "-Infinity". No other number in `values` is a string, so reading it back
is not ambiguous; in `config` they stay strings.

A checkpoint is a set of files, each cut into parts that are named by their SHA-256; its manifest
lists the files with their hashes and their parts in order.
"""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any, Literal, TypedDict

PROTOCOL = 2

SESSION, CONFIG, METRICS, TEXT, TABLE = "session", "config", "metrics", "text", "table"
CHECKPOINT, MEDIA, ALERT, FINISH = "checkpoint", "media", "alert", "finish"  # types of record
CONSOLE, EXCEPTION = "run/console", "run/exception"
ENVIRONMENT, CHANGES, PACKAGES = "run/environment", "run/changes", "run/packages"
"""Texts that Endlex records itself: what was printed (in chunks), what ended the run, and what it
was. Their steps are the session's number, of the console's chunks a million times that and more."""
LEVELS = ("info", "warning", "error")  # levels of an alert
TRAINER, SYSTEM = "trainer", "system"
"""Kinds of session: what the trainer logs, and what the shipper measures of its machine."""

Status = Literal["finished", "failed", "interrupted"]  # how a session says that it ended
STATUSES: tuple[Status, ...] = ("finished", "failed", "interrupted")
CRASHED = "crashed"  # status of a session whose writer is gone without having recorded its end
LOST = "lost"  # status of a session of which the server has heard nothing lately; it may return

Scope = Literal["write", "checkpoint", "read", "annotate", "manage"]
SCOPES: dict[Scope, str] = {
    "write": "send the journals of its own runs",
    "checkpoint": "send and fetch the checkpoints of its own runs",
    "read": "see every run",
    "annotate": "name, tag, note and archive runs, and dismiss alerts",
    "manage": "delete runs and checkpoints, and write to any run",
}
"""What a token can be allowed. A run is a token's own if the token created it or was given it."""

REPLACES = "replaces"
"""Key in a checkpoint's metadata: once published, it replaces the older ones with the same word."""
KEEP = "keep"  # alias of checkpoints that no rule removes; the only one that several may have
REMOVED = "removed"  # state of a published checkpoint that a rule or a person removed since

RUN_FILE = "run.json"
JOURNAL_DIR, STAGED_DIR, MEDIA_DIR, MANIFEST_DIR = "journal", "staged", "media", "manifests"

MAX_NAME_CHARS = 200  # length of a project's, run's or metric's name
MAX_STEP = 2**62
MAX_TEXT_CHARS = 1_000_000  # length of one logged text
MAX_CONSOLE_CHARS = 4 * 2**20  # of one session's output; then only its last lines are kept
MAX_REASON_CHARS = 1000
MAX_BATCH_BYTES = 8 * 2**20  # of one batch of journal lines, uncompressed, and so of one record
PART_BYTES = 16 * 2**20  # size of every part of a file but its last, as the client cuts them
MAX_PART_BYTES = 32 * 2**20  # size of the largest part that a server takes
MAX_PARTS_ASKED = 4096  # most parts that one "which are missing?" request may ask about
MAX_FILES = 10_000  # most files in one checkpoint
MAX_PATH_CHARS = 400  # length of a file's path inside a checkpoint

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}

RUN_ID = re.compile(r"[a-z0-9]{8,32}")
SESSION_ID = re.compile(r"[0-9a-z-]{1,64}")
CHECKPOINT_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,119}")
SHA256 = re.compile(r"[0-9a-f]{64}")


class EndlexError(Exception):
    """Stop with a message for the user: a wrong name or value, or a damaged journal."""

    exit_status = 1


class UsageError(EndlexError):
    """Stop with a message and the exit status of wrong usage, as a parser would."""

    exit_status = 2


class Part(TypedDict):
    """A stretch of a file, named by its content."""

    sha256: str
    bytes: int


class ManifestFile(TypedDict):
    """One file of a checkpoint; its content is its parts' in order."""

    path: str
    bytes: int
    sha256: str
    parts: list[Part]


class Manifest(TypedDict):
    """All that a checkpoint is; `created` is in Unix seconds."""

    protocol: int
    name: str
    step: int
    created: float
    aliases: list[str]
    metadata: dict[str, Any]
    files: list[ManifestFile]


def check_name(name: str, what: str) -> str:
    """Return `name` if it may name a project, a run or a metric."""
    if not isinstance(name, str) or not name.strip() or not name.isprintable():
        raise EndlexError(f"{what} {name!r} must be printable text on one line, and not empty")
    if len(name) > MAX_NAME_CHARS:
        raise EndlexError(f"{what} {name[:40]!r}... is longer than {MAX_NAME_CHARS} characters")
    return name


def _check(pattern: re.Pattern[str], what: str, rule: str, value: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise EndlexError(f"{what} {str(value)[:80]!r} must be {rule}")
    return value


check_run_id = partial(_check, RUN_ID, "run id", "8 to 32 lower-case letters and digits")
check_session_id = partial(
    _check, SESSION_ID, "session id", "1 to 64 lower-case letters, digits and dashes"
)
check_sha256 = partial(_check, SHA256, "SHA-256", "64 lower-case hexadecimal digits")
NAME_RULE = "1 to 120 letters, digits, dots, dashes and underscores, and not start with a dot"
check_checkpoint_name = partial(_check, CHECKPOINT_NAME, "checkpoint name", NAME_RULE)
"""Each returns its argument, or raises an `EndlexError`."""


def check_checkpoint_path(path: str) -> str:
    """Return `path` if it is safe as a file's path inside a checkpoint, on any system.

    It may not be absolute or too long, nor have an empty, `.` or `..` component, a backslash, a
    drive letter, or characters that no file's name should have: each is an `EndlexError`.
    """
    fault = ""
    if not isinstance(path, str) or not 0 < len(path) <= MAX_PATH_CHARS:
        fault = f"must have 1 to {MAX_PATH_CHARS} characters"
    elif re.search(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\\]", path) or path[1:2] == ":":
        fault = "has a character that is not allowed"
    elif not {"", ".", ".."}.isdisjoint(path.split("/")):
        fault = "must be relative, without empty, . or .. components"
    if fault:
        raise EndlexError(f"path {str(path)[:MAX_PATH_CHARS]!r} in a checkpoint {fault}")
    return path


def check_manifest(value: Any) -> Manifest:
    """Return `value`, decoded from JSON, if it is a whole and consistent manifest.

    Its keys must be there, its paths differ, and each file's parts add up to the file: anything
    else is an `EndlexError`.
    """
    _ensure(isinstance(value, dict), f"a manifest is a JSON object, not {type(value).__name__}")
    theirs = f"the manifest's protocol is {value.get('protocol')!r}"
    ours = f"this version of Endlex speaks {PROTOCOL}: upgrade the older side"
    _ensure(value.get("protocol") == PROTOCOL, f"{theirs}, and {ours}")
    check_checkpoint_name(value.get("name", ""))
    _check_count(value.get("step"), "step")
    created, aliases, files = value.get("created"), value.get("aliases"), value.get("files")
    is_time = isinstance(created, int | float) and math.isfinite(created)
    _ensure(is_time, f"the manifest's created is {created!r}, not a time in Unix seconds")
    are_there = isinstance(aliases, list) and isinstance(value.get("metadata"), dict)
    _ensure(are_there, "a manifest has a list of aliases and an object of metadata")
    for alias in aliases:
        check_checkpoint_name(alias)
    has_files = isinstance(files, list) and 0 < len(files) <= MAX_FILES
    _ensure(has_files, f"a checkpoint has 1 to {MAX_FILES:,} files")
    for file in files:
        _check_file(file)
    _check_distinct([file["path"] for file in files])
    return value  # type: ignore[no-any-return]


def _ensure(holds: bool, otherwise: str) -> None:
    if not holds:
        raise EndlexError(otherwise)


def _check_count(value: Any, what: str) -> int:
    is_count = isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_STEP
    _ensure(is_count, f"{what} is {value!r}; it must be a whole number from 0 to 2**62")
    return int(value)


def _check_file(file: Any) -> None:
    has_parts = isinstance(file, dict) and isinstance(file.get("parts"), list)
    _ensure(has_parts, "each file of a manifest is an object with path, bytes, sha256, parts")
    path = check_checkpoint_path(file.get("path", ""))
    size = _check_count(file.get("bytes"), f"the size of {path!r}")
    check_sha256(file.get("sha256", ""))
    held, limits = 0, f"a part of {path!r} must have 1 to {MAX_PART_BYTES:,} bytes"
    for part in file["parts"]:
        _ensure(isinstance(part, dict), f"each part of {path!r} is an object with sha256, bytes")
        check_sha256(part.get("sha256", ""))
        length = _check_count(part.get("bytes"), f"the size of a part of {path!r}")
        _ensure(0 < length <= MAX_PART_BYTES, limits)
        held += length
    _ensure(held == size, f"{path!r} has {size:,} bytes, but its parts have {held:,}")


def _check_distinct(paths: list[str]) -> None:
    if len(set(paths)) != len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise EndlexError(f"the checkpoint has two files named {twice!r}")
    directories = {path[:i] for path in paths for i, c in enumerate(path) if c == "/"}
    for path in directories.intersection(paths):
        raise EndlexError(f"{path!r} is a file and a directory in one checkpoint")


def move_aliases(checkpoints: list[dict[str, Any]]) -> None:
    """Leave each alias with the checkpoint that has it now: the newest published one, else any."""
    owners = dict[str, dict[str, Any]]()
    for checkpoint in sorted(checkpoints, key=lambda c: (c["state"] == "published", c["created"])):
        owners |= dict.fromkeys(checkpoint["aliases"] or (), checkpoint)
    for one in checkpoints:
        aliases = one["aliases"] or ()
        one["aliases"] = [name for name in aliases if name == KEEP or owners[name] is one]


def encode_number(value: float) -> float | str:
    """Return what stands for `value` in JSON."""
    if math.isfinite(value):
        return value
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def decode_number(value: float | str) -> float:
    """Undo `encode_number`."""
    if not isinstance(value, str):
        return value
    if value not in NON_FINITE:
        raise EndlexError(f"{value!r} is not a number, nor one of {', '.join(NON_FINITE)}")
    return NON_FINITE[value]
