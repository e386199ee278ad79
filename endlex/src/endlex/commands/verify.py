"""`endlex verify`: may this machine be torn down?

The answer is yes only when the server was asked just now and holds, with equal SHA-256, every byte
of every journal and every checkpoint that was saved, and nothing is at work here that could add to
them. Everything else, an unreachable server too, is a no, with what is missing and the command
that sends it.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endlex.client.checkpoints import Missing, verify_directory
from endlex.client.journal import content_length, session_files
from endlex.client.manifests import manifest_path
from endlex.client.staging import staged_names
from endlex.client.transport import Retry, Transport, TransportError
from endlex.commands.rendering import count, format_bytes, print_json, printable
from endlex.commands.server_api import explain, find_transport
from endlex.commands.targets import (
    find_local_run,
    find_run_directories,
    open_run_directory,
    runs_folder,
)
from endlex.commands.usage import UsageError
from endlex.protocol import EndlexError

SAFE = "safe to tear down"
NOT_SAFE = "NOT safe to tear down"


@dataclass
class Verdict:
    """What was found about one run's directory."""

    directory: Path
    project: str
    name: str
    journals: int
    bytes: int
    missing: list[Missing] = field(default_factory=list)
    removed: list[Missing] = field(default_factory=list)
    """Checkpoints that the server did publish, and has no more: pruned or deleted there."""
    error: str | None = None
    """Why the server could not be asked."""

    @property
    def is_safe(self) -> bool:
        """Whether nothing of value is here only."""
        return not self.missing and self.error is None

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return {
            "directory": str(self.directory),
            "project": self.project,
            "name": self.name,
            "journals": self.journals,
            "bytes": self.bytes,
            "safe": self.is_safe,
            "missing": [vars(missing) for missing in self.missing],
            "removed": [removed.name for removed in self.removed],
            "error": self.error,
        }


def verify(runs: Sequence[str], pruned_ok: bool, url: str | None, as_json: bool) -> int:
    """Print the verdict; 0 only when everything that was asked about is safe."""
    directories = _directories(runs)
    transport: Transport | None = None
    no_server = ""
    try:
        transport = find_transport(url)
    except EndlexError as error:
        no_server = str(error)
    verdicts = [_judge(directory, transport, no_server, pruned_ok) for directory in directories]
    safe = all(verdict.is_safe for verdict in verdicts)
    if as_json:
        print_json({"safe": safe, "runs": [verdict.as_json() for verdict in verdicts]})
        return 0 if safe else 1
    for verdict in verdicts:
        _print(verdict, transport.url if transport else "")
    print(SAFE if safe else NOT_SAFE)
    if not safe:
        _print_remedy([verdict for verdict in verdicts if not verdict.is_safe], url)
    return 0 if safe else 1


def _directories(runs: Sequence[str]) -> list[Path]:
    """Return the run directories on this machine that the words mean, all of them for none."""
    if not runs:
        found = find_run_directories(runs_folder())
        if not found:
            raise UsageError(
                f"no runs in {runs_folder()}: give a run's directory, or set ENDLEX_DIR to where "
                "they are"
            )
        return found
    directories = []
    for text in runs:
        directory = find_local_run(text)
        if directory is None:
            inside = find_run_directories(Path(text)) if Path(text).is_dir() else []
            if not inside:
                raise UsageError(
                    f"{text!r} is no run's directory, nor a run in {runs_folder()}: verify looks "
                    "at what is on this machine"
                )
            directories += inside
        else:
            directories.append(directory)
    return directories


def _judge(
    directory: Path, transport: Transport | None, no_server: str, pruned_ok: bool
) -> Verdict:
    owner = open_run_directory(directory)
    paths = session_files(directory)
    verdict = Verdict(
        directory,
        owner["project"],
        owner["name"],
        len(paths),
        sum(content_length(path) for path in paths),
        error=no_server or None,
    )
    if transport is not None:
        try:
            verdict.missing = verify_directory(directory, transport)
            verdict.removed = [m for m in verdict.missing if _was_published(directory, m)]
            if pruned_ok:
                verdict.missing = [m for m in verdict.missing if m not in verdict.removed]
        except Retry as error:
            verdict.error = str(explain(error))
        except (TransportError, EndlexError, OSError) as error:
            verdict.error = str(error)
    return verdict


def _was_published(directory: Path, missing: Missing) -> bool:
    """Whether a checkpoint was sent: its hashes are kept, its files are not, until it is there."""
    if missing.kind != "checkpoint" or missing.name in staged_names(directory):
        return False
    sent = manifest_path(directory, missing.name).is_file()
    return sent and "has no checkpoint" in missing.reason


def _print(verdict: Verdict, url: str) -> None:
    print(f"{verdict.directory}  ({printable(verdict.project)}/{printable(verdict.name)})")
    held = f"{count(verdict.journals, 'journal')}, {format_bytes(verdict.bytes)}"
    if verdict.is_safe:
        gone = f"; {count(len(verdict.removed), 'checkpoint')} pruned there since"
        print(f"  {held} and every checkpoint: the same on {url}{gone if verdict.removed else ''}")
        return
    if verdict.error is not None:
        print(f"  {held}: nothing could be compared: {printable(verdict.error)}")
    for missing in verdict.missing:
        said = " any more: it was published" if missing in verdict.removed else ""
        print(f"  {missing.kind} {printable(missing.name)}: {printable(missing.reason)}{said}")


def _print_remedy(unsafe: Sequence[Verdict], url: str | None) -> None:
    """Name the command that sends what is missing, or what to wait for."""
    address = f" --url {shlex.quote(url)}" if url else ""
    sending = [
        verdict
        for verdict in unsafe
        if verdict.error is not None
        or any(m.kind != "live" and m not in verdict.removed for m in verdict.missing)
    ]
    if any(missing.kind == "live" for verdict in unsafe for missing in verdict.missing):
        print("something is still at work: end it, or wait for it, and verify again")
    if any(missing in verdict.removed for verdict in unsafe for missing in verdict.missing):
        print(
            "what was pruned on purpose counts as settled with --pruned-ok; else `endlex push` it"
        )
    if sending:
        places = " ".join(shlex.quote(str(verdict.directory)) for verdict in sending)
        print(f"send what is missing with: endlex sync{address} {places}")
