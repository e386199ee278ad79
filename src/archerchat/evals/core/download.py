"""Find the evaluation bundle: a folder that is given, or an archive that is fetched once.

The archive is a zip file with the bundle in it, at its top or in one folder. It is checked
(checksums of its members, a bound on its size), unpacked beside its place, read as a bundle and
renamed, so a folder of that name is always whole.
"""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

from archerchat.data.hub import Notify, download_file
from archerchat.errors import DataError, UsageError
from archerchat.evals.core.bundle import TASK_LIST, load_bundle
from archerchat.files import exclusive, explained_writes, new_directory

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
"""The archive that the reference evaluates on."""
MAX_BYTES = 4 * 2**30
"""Largest unpacked bundle; the reference's takes a small part of that."""
OFFLINE_BUNDLE = Path(__file__).with_name("offline")
WITHOUT_NETWORK = "--bundle DIR names a folder with core.yaml, eval_meta_data.csv and eval_data"


def find_bundle(
    given: str | None, cache_dir: Path, *, notify: Notify = lambda message: None
) -> Path:
    """Return a bundle's folder.

    Args:
        given: a folder, the address of an archive, `offline` for the package's own tasks, or None
            for the reference's.
        cache_dir: holds what is downloaded, by address.

    Raises:
        UsageError: there is no such folder.
        DataError: the archive cannot be had, or is no bundle.
    """
    if given == "offline":
        return OFFLINE_BUNDLE
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
    if not folder.is_dir():
        notify(f"fetching {url}")
        archive = folder.with_suffix(".zip")
        with explained_writes(folder.parent), exclusive(folder.parent):
            download_file(
                url, archive, check_archive, without_network=WITHOUT_NETWORK, notify=notify
            )
            try:
                with zipfile.ZipFile(archive) as source, new_directory(folder) as temporary:
                    source.extractall(temporary)  # never writes outside it, whatever the names
                    load_bundle(_find_root(temporary))
            finally:  # an archive without a bundle is not kept either: the server may get a better
                archive.unlink()
    return _find_root(folder)


def check_archive(path: Path) -> None:
    """Make sure that an archive is whole, and not too large.

    Raises:
        DataError: it is not.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(member.file_size for member in archive.infolist()) > MAX_BYTES:
                raise DataError(f"{path} would unpack to more than {MAX_BYTES / 2**30:.0f} GiB")
            if broken := archive.testzip():
                raise DataError(f"{path}: the checksum of {broken!r} is wrong")
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise DataError(f"{path} is no usable zip archive: {error}") from error


def _find_root(folder: Path) -> Path:
    """Return where the bundle is in an unpacked archive: at the top, or in one folder."""
    lists = [*folder.glob(TASK_LIST), *folder.glob(f"*/{TASK_LIST}")]
    if len(lists) != 1:
        raise DataError(f"the archive holds {len(lists)} files {TASK_LIST}; a bundle has one")
    return lists[0].parent
