"""Send all that a run's directory holds now, in the foreground: what `endlex sync DIR` does.

A shipper that is at work there is ended first, and started again afterwards if a trainer still
writes; so a new address or token counts at once. Ctrl-C loses nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO

from endlex.client.checkpoints import damaged_media, drop_replaced, give_up
from endlex.client.journal_sync import JournalShipper, SessionDiffers, SessionSync, renew_session
from endlex.client.run_directory import require_run_file
from endlex.client.shipper import MEDIA, CheckpointShipper
from endlex.client.shipping import (
    DONE,
    FOREGROUND,
    holding,
    start_shipper,
    stop_shipper,
    take_lock,
    write_state,
)
from endlex.client.transfers import PATIENCE_SECONDS, Patience
from endlex.client.transport import Retry, Transport
from endlex.client.uploads import CheckpointFailed
from endlex.protocol import EndlexError
from endlex.reading import content_length, session_files, writer_is_alive

SyncProgress = Callable[[str, int, int], None]
"""Called with what is sent ("journal" or a checkpoint's name), the bytes that have arrived, and
all bytes."""
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
        drop_failed: give up the checkpoints and media that can never be sent, such as those whose
            files were rewritten before that.
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
    journals = JournalShipper(directory, run, transport)
    checkpoints = CheckpointShipper(directory, run, transport)
    waiter = Patience(patience)
    try:
        with holding(lock):
            try:
                if resend:
                    _renew_differing(directory, run, transport)
                _send_journals(directory, journals, waiter, progress)
                _send_checkpoints(directory, checkpoints, waiter, progress, drop_failed)
            finally:
                states = {"sessions": journals.states(), "checkpoints": checkpoints.states()}
                write_state(directory, DONE, {"url": transport.url, "error": None, **states})
    finally:
        if had_shipper and journals.has_live_trainer():
            start_shipper(directory, url=transport.url)
    errors, published = journals.errors(), set()
    for name, state in checkpoints.states().items():
        if state["state"] == "published":
            published.add(name)
        elif state["error"]:
            what = "media" if name == MEDIA else f"checkpoint {name}"
            errors.append(f"{what}: {state['error']}")
    if errors:
        raise EndlexError("; ".join(dict.fromkeys(errors)))
    return published


def _take_over(directory: Path) -> tuple[bool, IO[str]]:
    """Return whether a shipper had to give up the directory's lock, and the lock."""
    had_shipper = False
    for _ in range(ATTEMPTS):  # another one may have waited for the first
        had_shipper |= stop_shipper(directory)
        lock = take_lock(directory, FOREGROUND, seconds=LOCK_SECONDS)
        if lock is not None:
            return had_shipper, lock
    raise EndlexError(f"another process sends {directory} already: wait for it, or end it")


def _renew_differing(directory: Path, run: str, transport: Transport) -> None:
    """Give journals that differ from the server's copies another session id."""
    for path in session_files(directory):
        try:
            SessionSync(run, path, transport).ask()
        except SessionDiffers:
            if not writer_is_alive(path):
                renew_session(path)


def _send_journals(
    directory: Path, journals: JournalShipper, patience: Patience, progress: SyncProgress
) -> None:
    """Send every journal up to where it ends now."""
    targets = {path.stem: content_length(path) for path in session_files(directory)}

    def is_sent(session: SessionSync) -> bool:
        """Whether the server has what was there, and of a session that is over how it ended."""
        has_all = (session.acknowledged or 0) >= targets.get(session.session, 0)
        return bool(session.error or session.done or (has_all and writer_is_alive(session.path)))

    while True:
        patience.keep_trying(journals.tick)
        sessions = journals.sessions.values()
        done = sum(session.acknowledged or 0 for session in sessions)
        patience.progressed("journal", done)
        progress("journal", done, max(done, sum(targets.values())))
        if all(map(is_sent, sessions)):
            return


def _send_checkpoints(
    directory: Path,
    checkpoints: CheckpointShipper,
    patience: Patience,
    progress: SyncProgress,
    drop_failed: bool,
) -> None:
    """Send what is staged, and media."""
    drop_replaced(directory)
    for name in checkpoints.waiting():
        try:
            report = patience.watching(progress, name)
            patience.keep_trying(partial(checkpoints.send, name, report))
        except Retry:
            raise
        except CheckpointFailed as error:
            if drop_failed:
                checkpoints.forget(name)
                if name != MEDIA:
                    give_up(directory, name, str(error))
        except (EndlexError, OSError):
            continue  # it is among the states
    for sha256 in damaged_media(directory) if drop_failed else ():
        give_up(directory, sha256, "damaged before it was sent")
