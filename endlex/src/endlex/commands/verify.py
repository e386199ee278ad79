"""`endlex verify`: may this machine be torn down?

The answer is yes only when the server was asked just now and holds, with equal SHA-256, every byte
of every journal and every checkpoint that was saved, and nothing is at work here that could add to
them. Everything else, an unreachable server too, is a no, with what is missing and the command
that sends it. A checkpoint that the server published and that a rule or a person removed is named,
and no loss; one that it published and knows nothing of any more is.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from endlex.client.directories import RunFile, runs_folder
from endlex.client.shipper.control import BACKGROUND, read_state, shipper_process
from endlex.client.transport import Transport
from endlex.client.verify import Comparison, LetGo, compare_directory
from endlex.commands.rendering import count, format_age, format_bytes, print_json, printable
from endlex.commands.targets import find_server, local_runs
from endlex.protocol import SYSTEM, EndlexError, UsageError
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
    owner: RunFile
    journals: int
    bytes: int
    found: Comparison
    error: str | None = None
    """Why the server could not be asked."""

    @property
    def is_safe(self) -> bool:
        """Whether nothing of value is here only."""
        return not self.found.missing and self.error is None

    def as_json(self) -> dict[str, Any]:
        """Return it for `--json`."""
        return {
            "directory": str(self.directory),
            "project": self.owner["project"],
            "name": self.owner["name"],
            "journals": self.journals,
            "bytes": self.bytes,
            "safe": self.is_safe,
            **asdict(self.found),
            "error": self.error,
        }


def verify(runs: Sequence[str], url: str | None, as_json: bool) -> int:
    """Print the verdict; 0 only when everything that was asked about is safe."""
    known = local_runs(runs)
    if not known.found and not known.unreadable:
        raise UsageError(
            f"{known}: none in {runs_folder()} (ENDLEX_DIR), and none in the list that endlex.init "
            "keeps; give a run's directory"
        )
    transport: Transport | None = None
    no_server = ""
    try:
        transport = find_server(url).transport
    except EndlexError as error:
        no_server = str(error)
    verdicts = [_judge(*run, transport, no_server) for run in known.found.items()]
    safe = all(verdict.is_safe for verdict in verdicts) and not known.unreadable
    if as_json:
        answer = {
            "safe": safe,
            "runs": [verdict.as_json() for verdict in verdicts],
            "gone": list(map(str, known.gone)),
            "unreadable": {str(place): why for place, why in known.unreadable.items()},
        }
        print_json(answer)
        return 0 if safe else 1
    for verdict in verdicts:
        _print(verdict, transport.url if transport else "")
    if not runs or known.unreadable:
        print(known)
    print(SAFE if safe else NOT_SAFE)
    if not safe:
        _print_remedy([verdict for verdict in verdicts if not verdict.is_safe], url)
    return 0 if safe else 1


def _judge(directory: Path, owner: RunFile, transport: Transport | None, no_server: str) -> Verdict:
    found, error, size = Comparison(), no_server or None, 0
    paths = session_files(directory)
    if transport is not None:
        try:
            size = sum(content_length(path) for path in paths)
            _wait_for_shipper(directory)
            found = compare_directory(directory, transport)
        except (EndlexError, OSError) as fault:
            error = str(fault)
    return Verdict(directory, owner, len(paths), size, found, error)


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


def _print(verdict: Verdict, url: str) -> None:
    found, owner = verdict.found, verdict.owner
    print(f"{verdict.directory}  ({printable(owner['project'])}/{printable(owner['name'])})")
    held = f"{count(verdict.journals, 'journal')}, {format_bytes(verdict.bytes)}"
    if verdict.is_safe:
        kept = "every checkpoint that is kept" if found.let_go else "every checkpoint"
        print(f"  {held} and {kept}: the same on {url}")
    for reason, gone in _by_reason(found.let_go).items():
        names = ", ".join(printable(let_go.name) for let_go in gone[:NAMED])
        names += f" and {len(gone) - NAMED} more" if len(gone) > NAMED else ""
        when = format_age(max(let_go.removed for let_go in gone))
        print(
            f"  no longer on the server, on purpose ({printable(reason)}, {when}): "
            f"{count(len(gone), 'checkpoint')}: {names}"
        )
    if found.given_up:
        names = ", ".join(map(printable, found.given_up))
        print(f"  given up here, since it could not be sent: {names}")
    if verdict.error is not None:
        print(f"  nothing was compared: {printable(verdict.error)}")
    for missing in found.missing:
        print(f"  {printable(missing)}")


def _by_reason(let_go: Sequence[LetGo]) -> dict[str, list[LetGo]]:
    found: dict[str, list[LetGo]] = {}
    for one in let_go:
        found.setdefault(one.reason, []).append(one)
    return found


def _print_remedy(unsafe: Sequence[Verdict], url: str | None) -> None:
    """Name the command that sends what is missing, or what to wait for."""
    sync = f"endlex sync{f' --url {shlex.quote(url)}' if url else ''}"

    def places(*remedies: str) -> str:
        """Return the directories where one of these helps."""
        helped = [
            verdict.directory
            for verdict in unsafe
            if any(missing.remedy in remedies for missing in verdict.found.missing)
            or (verdict.error is not None and "sync" in remedies)
        ]
        return " ".join(shlex.quote(str(directory)) for directory in helped)

    if places("wait"):
        print("something is still at work: end it, or wait for it, and verify again")
    if places("restore"):
        print(
            "the server does not have what was published once: is it the right one? If it is, "
            "restore its data, or `endlex push` the files again under the same name"
        )
    if places("look"):
        print(
            "what a damaged line of a journal names cannot be compared: look at the line, and at "
            "the run on the server, before you delete anything"
        )
    if hopeless := places("drop"):
        print(
            "what cannot be sent: save it again, then give up the old one with: "
            f"{sync} {hopeless} --drop-failed"
        )
    if unsent := places("sync", "resend"):
        resend = " --resend" if places("resend") else ""
        print(f"send what is missing with: {sync}{resend} {unsent}")
