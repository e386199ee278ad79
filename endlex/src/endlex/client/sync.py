"""Send all that a run's directory holds now, in the foreground: what `endlex sync DIR` does.

A shipper that is at work there is ended first, and started again afterwards if a trainer still
writes; so a new address or token counts at once. Ctrl-C loses nothing. `push_checkpoint` sends
files that are in no run's directory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from endlex.client.checkpoints import (
    Staged,
    drop_replaced,
    files_of,
    give_up,
    staged_names,
)
from endlex.client.journal_sync import (
    JournalShipper,
    Session,
    SessionDiffers,
    SessionSync,
    renew_session,
)
from endlex.client.manifests import CheckpointFailed, build_manifest
from endlex.client.run_directory import require_run_file
from endlex.client.shipper import send_staged
from endlex.client.shipping import (
    DONE,
    FOREGROUND,
    holding,
    start_shipper,
    stop_shipper,
    take_lock,
    write_state,
)
from endlex.client.transport import Backoff, Retry, Transport
from endlex.client.uploads import PartSource, Progress, Upload, send_media
from endlex.protocol import (
    EndlexError,
    Manifest,
    check_checkpoint_name,
    check_run_id,
)
from endlex.reading import (
    content_length,
    session_files,
    writer_is_alive,
)

SyncProgress = Callable[[str, int, int], None]
"""Told what is sent ("journal" or a checkpoint's name), the bytes that are there, and all."""
PATIENCE_SECONDS = 60.0
LOCK_SECONDS = 1.0
ATTEMPTS = 3


def sync_directory(
    directory: Path,
    transport: Transport,
    progress: SyncProgress = lambda what, done, total: None,
    *,
    patience: float = PATIENCE_SECONDS,
    drop_failed: bool = False,
    resend: bool = False,
) -> set[str]:
    """Send what is there now, and return when the server has acknowledged and published it.

    Args:
        patience: seconds without any progress after which a fault of the network is raised.
        drop_failed: give up the checkpoints that can never be published, such as those whose files
            were rewritten before they were sent.
        resend: send journals that differ from the server's copies as new sessions.

    Returns:
        The checkpoints that were published: a directory that can only be read still holds them.

    Raises:
        EndlexError: the directory is no run's, another `endlex sync` is at work there, the server
            refuses something, or a checkpoint can never be published. The rest is sent first.
        Retry: the server could not be reached for too long.
    """
    run = require_run_file(directory)["run"]
    had_shipper, lock = _take_over(directory)
    sync = _Sync(directory, run, transport, progress, patience)
    try:
        with holding(lock):
            try:
                if resend:
                    sync.renew_differing()
                sync.send_journals()
                sync.send_checkpoints(drop_failed)
            finally:
                sync.publish()
    finally:
        if had_shipper and sync.journals.has_live_trainer():
            start_shipper(directory, url=transport.url)
    errors = [s.error for s in sync.journals.sessions.values() if s.error]
    errors += [f"checkpoint {name}: {error}" for name, error in sync.failed.items()]
    if errors:
        raise EndlexError("; ".join(dict.fromkeys(errors)))
    return sync.published


def _take_over(directory: Path) -> tuple[bool, IO[str]]:
    """The directory's lock, and whether a shipper had to give it up."""
    had_shipper = False
    for _ in range(ATTEMPTS):  # another one may have waited for the first
        had_shipper |= stop_shipper(directory)
        lock = take_lock(directory, FOREGROUND, seconds=LOCK_SECONDS)
        if lock is not None:
            return had_shipper, lock
    raise EndlexError(f"another process sends {directory} already: wait for it, or end it")


class _Sync:
    """One directory on its way."""

    def __init__(
        self,
        directory: Path,
        run: str,
        transport: Transport,
        progress: SyncProgress,
        patience: float,
    ) -> None:
        self._directory, self._run, self._transport = directory, run, transport
        self._progress, self._patience = progress, patience
        self.journals = JournalShipper(directory, run, transport)
        self.published: set[str] = set()
        self.failed: dict[str, str] = {}
        """Checkpoints that cannot be sent, with the reason."""
        self._backoff = Backoff(longest=5.0)
        self._progressed()

    def _progressed(self) -> None:
        self._backoff.reset()
        self._deadline = time.monotonic() + self._patience

    def _wait(self, error: Retry) -> None:
        """Wait after a fault, or raise it when there was no progress for too long."""
        seconds = self._backoff.wait(error)
        if time.monotonic() + seconds > self._deadline:
            raise error
        time.sleep(seconds)

    def renew_differing(self) -> None:
        """Give journals that differ from the server's copies another session id."""
        for path in session_files(self._directory):
            try:
                SessionSync(self._run, path, self._transport).ask()
            except SessionDiffers:
                if not writer_is_alive(path):
                    renew_session(path)

    def send_journals(self) -> None:
        """Send every journal up to where it ends now."""
        targets = {path.stem: content_length(path) for path in session_files(self._directory)}
        before = -1
        while True:
            try:
                self.journals.tick()
            except Retry as error:
                self._wait(error)
                continue
            sessions = self.journals.sessions.values()
            done = sum(s.sync.acknowledged or 0 for s in sessions)
            if done != before:
                before = done
                self._progressed()
            self._progress("journal", done, max(done, sum(targets.values())))
            if all(s.error or _is_sent(s, targets.get(s.sync.session, 0)) for s in sessions):
                return

    def send_checkpoints(self, drop_failed: bool) -> None:
        """Send what is staged, and media."""
        while True:
            try:
                send_media(self._directory, self._transport)
                break
            except Retry as error:
                self._wait(error)
            except EndlexError as error:
                self.failed["media"] = str(error)
                break
        drop_replaced(self._directory)
        for name in staged_names(self._directory):
            try:
                self._send_checkpoint(name)
                self.published.add(name)
            except Retry:
                raise
            except (EndlexError, OSError) as error:
                if drop_failed and isinstance(error, CheckpointFailed):
                    give_up(self._directory, name, str(error))
                else:
                    self.failed[name] = str(error)

    def _send_checkpoint(self, name: str) -> None:
        def report(done: int, total: int) -> None:
            self._progressed()
            self._progress(name, done, total)

        while True:
            try:
                send_staged(self._directory, self._run, name, self._transport, progress=report)
                return
            except Retry as error:
                self._wait(error)

    def publish(self) -> None:
        """Leave behind how far this came, as a shipper does."""
        checkpoints = {
            name: {"state": "failed", "error": error, "done_bytes": 0, "total_bytes": 0}
            for name, error in self.failed.items()
        }
        content = {"url": self._transport.url, "error": None, "checkpoints": checkpoints}
        write_state(self._directory, DONE, content | {"sessions": self.journals.states()})


def _is_sent(session: Session, target: int) -> bool:
    """Whether the server has what was there, and of a session that is over how it ended."""
    has_all = (session.sync.acknowledged or 0) >= target
    return session.done or (has_all and writer_is_alive(session.sync.path))


def push_checkpoint(
    run: str,
    source: Path,
    name: str,
    transport: Transport,
    *,
    step: int = 0,
    aliases: Sequence[str] = (),
    metadata: Mapping[str, Any] | None = None,
    progress: Progress = lambda done, total: None,
) -> Manifest:
    """Upload a file, or a directory's files, as a checkpoint of a run that the server knows.

    Nothing is staged: the files must not change meanwhile, which is noticed.

    Raises:
        CheckpointFailed: it cannot be published, such as when another one has the name.
        Retry: not now; calling again sends only what is left.
        Refused: the token does not allow it, or the server does not know the run.
        EndlexError: there is nothing to push, or a name is not one.
    """
    check_run_id(run)
    files = list(files_of(source))
    if not files:
        raise EndlexError(f"{str(source)!r} holds no files: nothing to push")
    states = [(inside, path.stat()) for inside, path in files]
    note: Staged = {
        "name": check_checkpoint_name(name),
        "step": step,
        # That of the newest file, not now, so that the same push again is the same manifest.
        "created": max(state.st_mtime for _, state in states),
        "aliases": [check_checkpoint_name(alias) for alias in aliases],
        "metadata": dict(metadata or {}),
        "files": [
            {"path": inside, "bytes": state.st_size, "changed": state.st_mtime_ns}
            for inside, state in states
        ],
    }
    root = source if source.is_dir() else source.parent
    manifest = build_manifest(root, note)
    source_parts = PartSource(root, manifest, note)
    Upload(run, manifest, source_parts, transport, progress=progress).run()
    return manifest
