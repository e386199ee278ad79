"""Find the evaluation bundle: a folder that is given, or an archive that is fetched once.

The archive is a zip file with the bundle in it, at its root or in one folder. It is checked
(checksums of its members, no name that leads out of the folder, a bound on its size), unpacked
beside its place, read as a bundle and renamed, so a folder of that name is always whole.
"""

from __future__ import annotations

import hashlib
import shutil
import stat
import zipfile
from pathlib import Path, PurePosixPath

from archerchat.data.hub import Notify, RetryPolicy, download_file
from archerchat.errors import DataError, UsageError
from archerchat.evals import offline_tasks
from archerchat.evals.core.bundle import TASK_LIST, load_bundle
from archerchat.files import exclusive, explained_writes, new_directory

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The archive that the reference evaluates on."""
MAX_BYTES = 4 * 2**30
"""Largest unpacked bundle; the reference's takes a small part of that."""
WITHOUT_NETWORK = "--bundle DIR names a folder with core.yaml, eval_meta_data.csv and eval_data"


def find_bundle(
    given: str | None,
    cache_dir: Path,
    *,
    notify: Notify = lambda message: None,
    retry: RetryPolicy | None = None,
) -> Path:
    """Return a bundle's folder.

    Args:
        given: a folder, the address of an archive, `offline` for the tasks that are generated
            here, or None for the reference's.
        cache_dir: holds what is downloaded, by address.

    Raises:
        UsageError: there is no such folder.
        DataError: the archive cannot be had, or is no bundle.
    """
    if given == offline_tasks.NAME:
        with explained_writes(cache_dir):
            return offline_tasks.offline_bundle(cache_dir)
    if given is not None and not given.startswith(("http://", "https://")):
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UsageError(
                f"--bundle {given}: there is no such folder; give one with {TASK_LIST}, or leave "
                "it out to download the bundle"
            )
        return folder
    url = given or BUNDLE_URL
    folder = cache_dir / "eval_bundles" / hashlib.sha256(url.encode()).hexdigest()[:16]
    if folder.is_dir():
        return folder
    notify(f"fetching {url}")
    archive = folder.with_suffix(".zip")
    with explained_writes(folder.parent), exclusive(folder.parent):
        download_file(
            url,
            archive,
            check_archive,
            without_network=WITHOUT_NETWORK,
            notify=notify,
            retry=retry,
        )
        try:
            unpack(archive, folder)
        finally:  # one that holds no bundle is not kept either: the server may get a better one
            archive.unlink()
    return folder


def check_archive(path: Path) -> None:
    """Make sure that an archive is whole and harmless.

    Raises:
        DataError: it is not; the message names the member.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            for member in members:
                _check_member(path, member)
            if len({member.filename for member in members}) < len(members):
                raise DataError(f"{path} has two members of one name")
            if sum(member.file_size for member in members) > MAX_BYTES:
                raise DataError(f"{path} would unpack to more than {MAX_BYTES / 2**30:.0f} GiB")
            if broken := archive.testzip():
                raise DataError(f"{path}: the checksum of {broken!r} is wrong")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is no usable zip archive: {error}") from error


def _check_member(path: Path, member: zipfile.ZipInfo) -> None:
    name = PurePosixPath(member.filename)
    wrong = None
    odd = any(sign in member.filename for sign in "\\:\0")
    if odd or name.is_absolute() or ".." in name.parts or not name.parts:
        wrong = ", which leads out of its folder"
    elif stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        wrong = " that is no plain file"
    elif member.flag_bits & 1:
        wrong = " that is encrypted"
    if wrong:
        raise DataError(f"{path} has a member {member.filename!r}{wrong}")


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a checked archive's bundle to `folder`, whole or not at all.

    Raises:
        DataError: there is no bundle in it.
    """
    with zipfile.ZipFile(archive) as source:
        names = {member: PurePosixPath(member.filename) for member in source.infolist()}
        lists = [name for name in names.values() if name.name == TASK_LIST]
        roots = [path.parent for path in lists if len(path.parts) <= 2]
        if len(roots) != 1:
            raise DataError(f"{archive} holds {len(roots)} files {TASK_LIST}; a bundle has one")
        with new_directory(folder) as temporary:
            for member, name in names.items():
                if not member.is_dir() and name.is_relative_to(roots[0]):
                    target = temporary / name.relative_to(roots[0])
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with source.open(member) as content, target.open("wb") as file:
                        shutil.copyfileobj(content, file)
            load_bundle(temporary)
