"""Checkpoints in a run's directory: those that wait to be sent, and what is known of the others.

    staged/NAME/...       copies of the files (clones where the file system has them), so that what
                          the trainer does to its own after `run.save` changes nothing
    staged/.NAME.json     step, aliases, metadata, and each file's size and time of change
    manifests/NAME.json   the hashes of its files, kept after it was sent

Many trainers overwrite the previous checkpoint, so copies are the default. A trainer that never
rewrites a file in place can ask for hard links: they cost a few system calls per file and no space.
A link shares its content with the trainer's file: if that is rewritten all the same, size or time
differ from the note, and the checkpoint is reported instead of sent.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from itertools import chain, count
from pathlib import Path
from typing import Any, BinaryIO, TypedDict, cast

from endlex import protocol
from endlex.client.process import READ_ONLY, warn, write_whole
from endlex.protocol import MANIFEST_DIR, PART_BYTES, STAGED_DIR, EndlexError, Manifest

FICLONE = 0x40049409  # of linux/fs.h: makes one file's content another's, copied when written
GIVEN_UP, DAMAGED = ".given-up", ".damaged"
"""Ends of names: of a note that a checkpoint was given up; of a part of media that is damaged."""


class CheckpointFailed(EndlexError):
    """This checkpoint cannot be published as it is; trying again does not help."""


class FileChanged(CheckpointFailed):
    """A file is not what it was when it was saved."""

    def __init__(self, inside: str) -> None:
        fault = f"file changed: {inside!r} was rewritten in place after it was saved"
        remedy = "write checkpoints under a temporary name and rename them, and save this one again"
        super().__init__(f"{fault}; {remedy}")


class StagedFile(TypedDict):
    """What a file was when it was saved; `changed` is its modification time in nanoseconds."""

    path: str
    bytes: int
    changed: int


class Staged(TypedDict):
    """The note beside the files; `created` is in Unix seconds."""

    name: str
    step: int
    created: float
    aliases: list[str]
    metadata: dict[str, Any]
    files: list[StagedFile]


def describe_file(inside: str, status: os.stat_result) -> StagedFile:
    return {"path": inside, "bytes": status.st_size, "changed": status.st_mtime_ns}


def _is_as_saved(file: StagedFile, status: os.stat_result) -> bool:
    # A note of a later version may hold more.
    return (file.get("bytes"), file.get("changed")) == (status.st_size, status.st_mtime_ns)


def files_of(source: Path, outside_links: bool = True) -> Iterator[tuple[str, Path]]:
    """Yield the path inside the checkpoint, and the place, of each file that `source` names.

    Links are followed, but not to a directory that is around them, and out of `source` only with
    `outside_links`. Links to nothing, sockets and pipes are left out with a warning.
    Nothing at `source`, or a link that leads out of it, is an `EndlexError`.
    """
    if source.is_file():
        yield protocol.check_checkpoint_path(source.name), source
        return
    if not source.is_dir():
        raise EndlexError(f"{str(source)!r} is neither a file nor a directory: nothing to save")
    root = source.resolve()
    for inside, path in _files_in(source, "", (root,)):
        if not outside_links and not (place := path.resolve()).is_relative_to(root):
            fault = f"{inside!r} leads out of {str(source)!r}, to {str(place)!r}"
            raise EndlexError(f"{fault}: give outside_links=True if that belongs to the checkpoint")
        yield inside, path


def _files_in(folder: Path, prefix: str, around: tuple[Path, ...]) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder.iterdir()):
        inside = f"{prefix}{path.name}"
        if path.is_file():
            yield protocol.check_checkpoint_path(inside), path
        elif not path.is_dir():
            kind = "links to nothing" if path.is_symlink() else "is neither a file nor a directory"
            warn(f"{str(path)!r} {kind}: it is left out of the checkpoint")
        elif (place := path.resolve()) not in around and not around[0].is_relative_to(place):
            yield from _files_in(path, f"{inside}/", (*around, place))


def stage(
    directory: Path, source: Path, note: Staged, *, link: bool, outside_links: bool
) -> Staged | None:
    """Keep `source` as a checkpoint of a run's directory until it is sent; `Run.save` says how.

    Takes the note without files, and perhaps without a name, and returns the whole one; None if
    `source` is a directory without files.
    """
    for alias in note["aliases"]:
        protocol.check_checkpoint_name(alias)
    name = protocol.check_checkpoint_name(note["name"] or _name_of(source, note["step"]))
    found = list(files_of(source, outside_links))
    if len(found) > protocol.MAX_FILES:
        limit = f"a checkpoint has at most {protocol.MAX_FILES:,}"
        raise EndlexError(f"{str(source)!r} has {len(found):,} files; {limit}")
    if not found:
        return None
    folder = directory / STAGED_DIR
    folder.mkdir(parents=True, exist_ok=True)
    names = chain([name], (f"{name[:110]}-{number}" for number in count(2)))
    name = next(candidate for candidate in names if not has_saved(directory, candidate))
    building = folder / f".{name}.{os.urandom(4).hex()}.building"
    try:
        files = [_keep(path, inside, building / inside, link) for inside, path in found]
        note = {**note, "name": name, "files": files}
        write_whole(note_path(directory, name), json.dumps(note).encode(), durable=False)
        building.rename(folder / name)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    return note


def _name_of(source: Path, step: int) -> str:
    """Return a name from the path, with the step unless it ends with that already."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", source.resolve().name).strip("-.")[:100] or "checkpoint"
    digits = re.search(r"[0-9]+$", stem)
    return stem if digits and int(digits[0]) == step else f"{stem}-{step}"


def has_saved(directory: Path, name: str) -> bool:
    """Whether a run's directory has a checkpoint of this name: waiting, sent or given up."""
    staged, sent = directory / STAGED_DIR / name, manifest_path(directory, name)
    return staged.exists() or sent.exists() or name in given_up(directory)


def _keep(source: Path, inside: str, target: Path, link: bool) -> StagedFile:
    source = source.resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    if not _clone(source, target):
        # Copies are of the content alone: exFAT and the like refuse permissions.
        ways: list[Callable[[Path, Path], object]] = [shutil.copyfile, os.link]
        first, second = reversed(ways) if link else ways
        try:
            first(source, target)
        except OSError:  # no links to there, or no space for a copy
            target.unlink(missing_ok=True)
            second(source, target)
    return describe_file(inside, target.stat())


def _clone(source: Path, target: Path) -> bool:
    """Share the content until one side writes; where that works, later writes are harmless."""
    status = source.stat()
    if sys.platform != "linux" or not status.st_size:
        return False
    try:
        with source.open("rb") as content, target.open("xb") as clone:
            fcntl.ioctl(clone.fileno(), FICLONE, content.fileno())
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    except OSError:
        target.unlink(missing_ok=True)
        return False
    return True


def note_path(directory: Path, name: str) -> Path:
    """Return where the note of a staged checkpoint is; no checkpoint's name starts with a dot."""
    return directory / STAGED_DIR / f".{name}.json"


def read_note(directory: Path, name: str) -> Staged:
    path = note_path(directory, name)
    try:
        note = json.loads(path.read_bytes())
        for file in note["files"]:
            protocol.check_checkpoint_path(file["path"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EndlexError(f"{path} cannot be read ({error}): save the checkpoint again") from error
    return cast(Staged, note)


def staged_names(directory: Path) -> list[str]:
    """Return the names of the checkpoints that wait to be sent, oldest first."""
    found = []
    for path in filter(Path.is_dir, (directory / STAGED_DIR).glob("*")):
        if protocol.CHECKPOINT_NAME.fullmatch(name := path.name):
            saved = 0
            with contextlib.suppress(OSError):  # it is being removed
                saved = note_path(directory, name).stat().st_mtime_ns
            found.append((saved, name))
    return [name for _, name in sorted(found)]


def staged_change(directory: Path, name: str) -> str | None:
    """Return what happened to a staged checkpoint's files since they were saved, or None."""
    how = "was rewritten in place after it was saved with link=True: save it again, without that"
    with contextlib.suppress(EndlexError):  # it is being removed: the server has it
        for file in read_note(directory, name)["files"]:
            with contextlib.suppress(OSError):  # likewise
                status = (directory / STAGED_DIR / name / file["path"]).stat()
                if not _is_as_saved(file, status):
                    return f"file {file['path']!r} {how}"
    return None


def unstage(directory: Path, name: str) -> None:
    """Drop the files of a checkpoint that the server has, or that was never whole."""
    shutil.rmtree(directory / STAGED_DIR / name, ignore_errors=True)
    with contextlib.suppress(OSError):  # a directory that can only be read
        note_path(directory, name).unlink(missing_ok=True)


def drop_replaced(directory: Path) -> list[str]:
    """Drop the staged checkpoints that a later staged one replaces, and return their names.

    Only the process that sends may call it: it must not be in the middle of one.
    """
    newest, dropped = set[str](), list[str]()
    names = staged_names(directory)
    for name in reversed(names) if len(names) > 1 else ():  # twice a second: one alone is not read
        word = None
        with contextlib.suppress(EndlexError, KeyError, AttributeError):  # sending it reports that
            word = read_note(directory, name)["metadata"].get(protocol.REPLACES)
        if isinstance(word, str) and word in newest:
            unstage(directory, name)
            dropped.append(name)
        elif isinstance(word, str):
            newest.add(word)
    return dropped


def give_up(directory: Path, name: str, reason: str) -> None:
    """Drop a staged checkpoint, or a damaged part of media by its hash, and note the reason."""
    path = directory / MANIFEST_DIR / f".{name}{GIVEN_UP}"
    path.parent.mkdir(exist_ok=True)
    write_whole(path, json.dumps({"reason": reason}).encode())
    manifest_path(directory, name).unlink(missing_ok=True)
    (directory / protocol.MEDIA_DIR / f"{name}{DAMAGED}").unlink(missing_ok=True)
    unstage(directory, name)


def given_up(directory: Path) -> set[str]:
    """Return the checkpoints' names, and the hashes of media, that `give_up` dropped here."""
    found = (directory / MANIFEST_DIR).glob(f".*{GIVEN_UP}")
    return {path.name[1:].removesuffix(GIVEN_UP) for path in found}


def waiting_media(directory: Path) -> list[str]:
    """Return the parts of media, by hash, that wait in a run's directory."""
    names = [path.name for path in (directory / protocol.MEDIA_DIR).glob("*")]
    return list(filter(protocol.SHA256.fullmatch, names))


def damaged_media(directory: Path) -> list[str]:
    """Return the parts of media, by hash, that were damaged before they could be sent."""
    return [path.stem for path in (directory / protocol.MEDIA_DIR).glob(f"*{DAMAGED}")]


def manifest_path(directory: Path, name: str) -> Path:
    return directory / MANIFEST_DIR / f"{name}.json"


def load_manifest(directory: Path, name: str) -> Manifest | None:
    """Return the manifest of a checkpoint, or None if it was not hashed here."""
    path = manifest_path(directory, name)
    try:
        return protocol.check_manifest(json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, EndlexError) as error:
        raise EndlexError(f"{path} is damaged ({error}): delete it, it is made again") from error


def staged_manifest(directory: Path, note: Staged) -> Manifest:
    """Return the manifest of a staged checkpoint; it is made and kept when it is first needed."""
    with contextlib.suppress(EndlexError):  # a damaged one is made again
        if (kept := load_manifest(directory, note["name"])) is not None:
            return kept
    manifest = build_manifest(directory / STAGED_DIR / note["name"], note)
    path = manifest_path(directory, note["name"])
    try:
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps(manifest).encode())
    except OSError as error:
        if error.errno not in READ_ONLY:
            raise
    return manifest


def build_manifest(root: Path, note: Staged) -> Manifest:
    """Hash a checkpoint's files, which are below `root`, whole and in parts; read each once."""
    return {
        "protocol": protocol.PROTOCOL,
        "name": note["name"],
        "step": note["step"],
        "created": note["created"],
        "aliases": note["aliases"],
        "metadata": note["metadata"],
        "files": [_hash_file(root, file) for file in note["files"]],
    }


def _hash_file(root: Path, file: StagedFile) -> protocol.ManifestFile:
    whole, parts = hashlib.sha256(), list[protocol.Part]()
    with open_unchanged(root, file) as content:
        while part := content.read(PART_BYTES):
            whole.update(part)
            parts.append({"sha256": hashlib.sha256(part).hexdigest(), "bytes": len(part)})
    if sum(part["bytes"] for part in parts) != file["bytes"]:  # such as a file of /proc
        raise FileChanged(file["path"])
    hashed = whole.hexdigest()
    return {"path": file["path"], "bytes": file["bytes"], "sha256": hashed, "parts": parts}


@contextlib.contextmanager
def open_unchanged(root: Path, file: StagedFile) -> Iterator[BinaryIO]:
    """Open a file, and check before and after the block that it is what the note says."""

    def check() -> None:
        if not _is_as_saved(file, os.fstat(content.fileno())):
            raise FileChanged(inside)

    inside = file["path"]
    try:
        content = (root / inside).open("rb")
    except OSError as error:
        raise CheckpointFailed(f"{inside!r} cannot be read ({error}): save it again") from error
    with content:
        check()
        yield content
        check()
