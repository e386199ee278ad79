"""`endlex verify`: may this machine be torn down?

The answer is yes only when the server was asked just now and holds, with equal SHA-256, every byte
of every journal and every checkpoint that was saved, and nothing is at work here that could add to
them. Everything else, an unreachable server too, is a no, with what is missing and the command
that sends it. A checkpoint that the server published and let go of by a rule or by hand is named,
and no loss; one that it published and knows nothing of any more is.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from endlex.api import helpful
from endlex.client.checkpoints import staged_names
from endlex.client.manifests import manifest_path
from endlex.client.run_directory import runs_folder
from endlex.client.shipping import BACKGROUND, read_state, shipper_process
from endlex.client.transport import Retry, Transport, TransportError
from endlex.client.verify import LetGo, Missing, compare_directory
from endlex.commands.rendering import count, format_age, format_bytes, print_json, printable
from endlex.commands.targets import (
    LocalRuns,
    find_local_run,
    find_run_directories,
    find_server,
    local_runs,
    open_run_directory,
)
from endlex.commands.usage import UsageError
from endlex.protocol import SYSTEM, EndlexError
from endlex.reading import content_length, session_files, session_kind, writer_is_alive

SAFE = "safe to tear down"
NOT_SAFE = "NOT safe to tear down"
SHIPPER_SECONDS = 10.0
POLL_SECONDS = 0.1
NAMED = 5
"""Checkpoints that went for one reason and are named; the others are counted."""


@dataclass
class Verdict:
    """What was found about one run's directory."""

    directory: Path
    project: str
    name: str
    journals: int
    bytes: int
    missing: list[Missing] = field(default_factory=list)
    let_go: list[LetGo] = field(default_factory=list)
    given_up: list[str] = field(default_factory=list)
    lost: list[Missing] = field(default_factory=list)
    """Checkpoints among the missing that the server published, and knows nothing of."""
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
            "let_go": [vars(let_go) for let_go in self.let_go],
            "given_up": self.given_up,
            "error": self.error,
        }


def verify(runs: Sequence[str], url: str | None, as_json: bool) -> int:
    """Print the verdict; 0 only when everything that was asked about is safe."""
    known = None if runs else local_runs()
    directories = _directories(runs) if known is None else _all_of(known)
    transport: Transport | None = None
    no_server = ""
    try:
        transport = find_server(url).transport
    except EndlexError as error:
        no_server = str(error)
    verdicts = [_judge(directory, transport, no_server) for directory in directories]
    safe = all(verdict.is_safe for verdict in verdicts) and not (known and known.unreadable)
    if as_json:
        answer = {"safe": safe, "runs": [verdict.as_json() for verdict in verdicts]}
        if known is not None:
            answer["gone"] = list(map(str, known.gone))
            answer["unreadable"] = {str(place): why for place, why in known.unreadable.items()}
        print_json(answer)
        return 0 if safe else 1
    for verdict in verdicts:
        _print(verdict, transport.url if transport else "")
    if known is not None:
        print(known)
    print(SAFE if safe else NOT_SAFE)
    if not safe:
        _print_remedy([verdict for verdict in verdicts if not verdict.is_safe], url)
    return 0 if safe else 1


def _all_of(known: LocalRuns) -> list[Path]:
    if not known.found and not known.unreadable:
        raise UsageError(
            f"{known}: none in {runs_folder()} (ENDLEX_DIR), and none in the list that endlex.init "
            "keeps; give a run's directory"
        )
    return list(known.found)


def _directories(runs: Sequence[str]) -> list[Path]:
    """Return the run directories on this machine that the words mean."""
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


def _judge(directory: Path, transport: Transport | None, no_server: str) -> Verdict:
    owner = open_run_directory(directory)
    paths = session_files(directory)
    verdict = Verdict(
        directory, owner["project"], owner["name"], len(paths), 0, error=no_server or None
    )
    if transport is not None:
        try:
            verdict.bytes = sum(content_length(path) for path in paths)
            _wait_for_shipper(directory)
            found = compare_directory(directory, transport)
            verdict.missing, verdict.let_go = found.missing, found.let_go
            verdict.given_up = found.given_up
            verdict.lost = [m for m in verdict.missing if _was_published(directory, m)]
        except Retry as error:
            verdict.error = str(helpful(error))
        except (TransportError, EndlexError, OSError) as error:
            verdict.error = str(error)
    return verdict


def _wait_for_shipper(directory: Path) -> None:
    """Give a shipper whose trainer is gone the moment that it needs to end by itself."""
    deadline = time.monotonic() + SHIPPER_SECONDS
    while time.monotonic() < deadline:
        shipper = shipper_process(directory)
        if shipper is None or shipper.kind != BACKGROUND or read_state(directory).get("error"):
            return
        trainers = [path for path in session_files(directory) if session_kind(path) != SYSTEM]
        if any(writer_is_alive(path) for path in trainers):
            return
        time.sleep(POLL_SECONDS)


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
        kept = "every checkpoint that is kept" if verdict.let_go else "every checkpoint"
        print(f"  {held} and {kept}: the same on {url}")
    for reason, gone in _by_reason(verdict.let_go).items():
        names = ", ".join(printable(let_go.name) for let_go in gone[:NAMED])
        names += f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        when = format_age(max(let_go.removed for let_go in gone))
        print(
            f"  no longer on the server, on purpose ({printable(reason)}, {when}): "
            f"{count(len(gone), 'checkpoint')}: {names}"
        )
    if verdict.given_up:
        names = ", ".join(map(printable, verdict.given_up))
        print(f"  given up here, since it could not be sent: {names}")
    if verdict.is_safe:
        return
    if verdict.error is not None:
        print(f"  {held}: nothing could be compared: {printable(verdict.error)}")
    for missing in verdict.missing:
        said = ", though it was published there once" if missing in verdict.lost else ""
        print(f"  {missing.kind} {printable(missing.name)}: {printable(missing.reason)}{said}")


def _by_reason(let_go: Sequence[LetGo]) -> dict[str, list[LetGo]]:
    found: dict[str, list[LetGo]] = {}
    for one in let_go:
        found.setdefault(one.reason, []).append(one)
    return found


def _print_remedy(unsafe: Sequence[Verdict], url: str | None) -> None:
    """Name the command that sends what is missing, or what to wait for."""
    address = f" --url {shlex.quote(url)}" if url else ""
    sending = [
        verdict
        for verdict in unsafe
        if verdict.error is not None
        or any(
            m.kind != "live" and m not in verdict.lost and not m.hopeless for m in verdict.missing
        )
    ]
    if any(missing.kind == "live" for verdict in unsafe for missing in verdict.missing):
        print("something is still at work: end it, or wait for it, and verify again")
    if any(verdict.lost for verdict in unsafe):
        print(
            "the server does not have what was published once: is it the right one? Otherwise "
            "restore its data, or `endlex push` the files again under the same name"
        )
    hopeless = [verdict for verdict in unsafe if any(m.hopeless for m in verdict.missing)]
    if hopeless:
        places = " ".join(shlex.quote(str(verdict.directory)) for verdict in hopeless)
        print(
            "what cannot be sent: save it again, then give up the old one with: "
            f"endlex sync{address} {places} --drop-failed"
        )
    if sending:
        places = " ".join(shlex.quote(str(verdict.directory)) for verdict in sending)
        differ = any(m.kind == "journal" and not m.bytes for v in sending for m in v.missing)
        resend = " --resend" if differ else ""
        print(f"send what is missing with: endlex sync{address}{resend} {places}")
